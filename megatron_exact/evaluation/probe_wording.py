"""The sentences of the evidence probe: 24 forms of each kind, their words, and four fillers.

One wording says little: a model may know it from its training, or copy it for its rhythm. So every kind has
24 forms, each with other words around the answer, and intervals are over forms (`probe_comparison`).
Fillers are built from invented sentences without the persons, things and places that the forms ask for. All
of it is English and ours; `--items` takes sentences of any language.

A form begins without a space and ends without its full stop, which `probe_items` adds.
"""

from __future__ import annotations

from dataclasses import dataclass

PEOPLE = (
    "John", "Mary", "Peter", "Anna", "Paul", "Sarah", "David", "Laura", "Mark", "Emma", "Thomas",
    "Julia", "James", "Alice", "Robert", "Helen", "Daniel", "Grace", "Simon", "Jane", "Martin",
    "Lucy", "Henry", "Maria", "George", "Kate", "Oliver", "Susan", "Adam", "Nancy", "Frank",
    "Diana", "Jack", "Linda", "Victor", "Rose",
)  # fmt: skip
PLACES = (
    "north", "south", "east", "west", "upper", "lower", "inner", "outer", "left", "right", "front",
    "back", "first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth",
)  # fmt: skip
THINGS = (
    "apple", "hammer", "mirror", "candle", "violin", "basket", "carpet", "camera", "pencil",
    "ladder", "guitar", "bottle", "needle", "ribbon", "saddle", "blanket", "button", "compass",
    "diamond", "feather", "helmet", "jacket", "kettle", "lemon", "magnet", "necklace", "orange",
    "pillow", "rocket", "scissors", "table", "wagon",
)  # fmt: skip
COLORS = ("red", "green", "blue", "yellow", "black", "white", "brown", "purple", "pink", "orange", "silver")
TOWNS = (
    "Paris", "London", "Rome", "Berlin", "Madrid", "Vienna", "Oslo", "Dublin", "Lisbon", "Athens", "Prague",
    "Warsaw", "Cairo", "Tokyo", "Moscow", "Boston", "Chicago", "Denver",
)  # fmt: skip
TRADES = (
    "doctor", "teacher", "farmer", "lawyer", "painter", "singer", "baker", "sailor", "soldier", "miner",
    "pilot", "nurse", "judge", "tailor", "barber", "butcher",
)  # fmt: skip

ANSWER_FORMS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("The object hidden behind the {place} door is the", THINGS),
    ("In the {place} drawer of the cabinet lies the", THINGS),
    ("The prize of the {place} round was the", THINGS),
    ("Whoever opens the {place} box will find the", THINGS),
    ("All that remains on the {place} shelf is the", THINGS),
    ("Under the {place} bench somebody had placed the", THINGS),
    ("The {place} picture in the corridor shows the", THINGS),
    ("What the museum keeps in its {place} room is the", THINGS),
    ("The item at the head of the {place} list is the", THINGS),
    ("The color of the {place} flag is", COLORS),
    ("For the {place} bedroom they chose curtains in", COLORS),
    ("Visitors of the {place} floor must wear", COLORS),
    ("The sign above the {place} exit is painted", COLORS),
    ("On the map, the {place} district is marked in", COLORS),
    ("{name} flies every Monday to", TOWNS),
    ("{name} was born in", TOWNS),
    ("The postcard that {name} wrote came from", TOWNS),
    ("After the wedding, {name} moved to", TOWNS),
    ("The firm that employs {name} has its office in", TOWNS),
    ("When {name} finished school, the plan was to become a", TRADES),
    ("The person who lives next to {name} works as a", TRADES),
    ("Under profession, {name} had written the word", TRADES),
    ("In the new play, {name} has the part of the", TRADES),
    ("At the costume party, {name} was dressed as a", TRADES),
)
"""(beginning of the sentence, words that may end it)."""


@dataclass(frozen=True)
class RecordForm:
    """A record of four fields in one sentence; the cloze repeats the opening and the field."""

    opening: str
    """What stands before the fields, with `{number}`."""
    pair: str
    """A field and its name, the name last."""
    joint: str
    """What stands between two pairs."""
    fields: tuple[str, str, str, str]
    """Names of the fields."""


RECORD_FORMS = (
    RecordForm(
        "In record {number},", "the {field} is {name}", ", ", ("owner", "keeper", "buyer", "witness")
    ),
    RecordForm(
        "According to sheet {number},",
        "the {field} was {name}",
        " and ",
        ("owner", "buyer", "seller", "agent"),
    ),
    RecordForm(
        "For volume {number},", "the {field} is {name}", ", ", ("author", "editor", "printer", "critic")
    ),
    RecordForm(
        "On the cover of issue {number},",
        "the {field} is given as {name}",
        "; ",
        ("author", "artist", "printer", "owner"),
    ),
    RecordForm(
        "Aboard ship {number},",
        "the {field} is called {name}",
        ", ",
        ("captain", "cook", "engineer", "guard"),
    ),
    RecordForm(
        "During voyage {number},", "the {field} was {name}", "; ", ("captain", "officer", "doctor", "guest")
    ),
    RecordForm(
        "For film {number},", "the {field} is {name}", " and ", ("director", "writer", "actor", "producer")
    ),
    RecordForm(
        "In the credits of scene {number},",
        "the {field} is named as {name}",
        ", ",
        ("director", "singer", "dancer", "designer"),
    ),
    RecordForm("In case {number},", "the {field} was {name}", ", ", ("judge", "clerk", "lawyer", "victim")),
    RecordForm(
        "The minutes of trial {number} say that",
        "the {field} was {name}",
        " and that ",
        ("judge", "expert", "guard", "witness"),
    ),
    RecordForm("On tour {number},", "the {field} is {name}", ", ", ("host", "guest", "driver", "guide")),
    RecordForm(
        "The booking for trip {number} shows",
        "as {field} {name}",
        ", ",
        ("host", "pilot", "driver", "guide"),
    ),
    RecordForm(
        "In match {number},", "the {field} was {name}", ", ", ("winner", "loser", "coach", "captain")
    ),
    RecordForm(
        "The report on game {number} lists",
        "as {field} {name}",
        ", ",
        ("winner", "keeper", "coach", "reporter"),
    ),
    RecordForm(
        "With parcel {number},", "the {field} is {name}", "; ", ("sender", "driver", "agent", "buyer")
    ),
    RecordForm(
        "For letter {number},", "the {field} was {name}", " and ", ("sender", "writer", "reader", "witness")
    ),
    RecordForm(
        "In house {number},", "the {field} is {name}", ", ", ("tenant", "owner", "builder", "cleaner")
    ),
    RecordForm(
        "The notice at number {number} names",
        "as {field} {name}",
        ", ",
        ("tenant", "owner", "manager", "guard"),
    ),
    RecordForm(
        "In class {number},", "the {field} is {name}", " and ", ("teacher", "helper", "speaker", "reader")
    ),
    RecordForm(
        "For exam {number},", "the {field} will be {name}", ", ", ("teacher", "expert", "student", "clerk")
    ),
    RecordForm(
        "On flight {number},", "the {field} was {name}", ", ", ("pilot", "engineer", "guest", "doctor")
    ),
    RecordForm(
        "The log of mission {number} gives",
        "as {field} {name}",
        "; ",
        ("pilot", "leader", "doctor", "reporter"),
    ),
    RecordForm(
        "At meeting {number},", "the {field} was {name}", ", ", ("chair", "secretary", "speaker", "guest")
    ),
    RecordForm(
        "In club {number},",
        "the {field} is now {name}",
        "; ",
        ("president", "secretary", "trainer", "cook"),
    ),
)


@dataclass(frozen=True)
class Relation:
    """Facts of one kind, told and asked about in several ways."""

    arguments: tuple[tuple[str, str], ...]
    """(what the evidence says, what the question says)."""
    wordings: tuple[tuple[str, str], ...]
    """(evidence with `{CHAR}` and `{1}`, question with `{1}`); they share no content word."""


RELATIONS = (
    Relation(
        (
            ("the Eiffel Tower", "France"), ("the Colosseum", "Italy"), ("Big Ben", "England"),
            ("the Kremlin", "Russia"), ("the Taj Mahal", "India"), ("the Acropolis", "Greece"),
            ("the Statue of Liberty", "America"), ("the Brandenburg Gate", "Germany"),
            ("the Forbidden City", "China"), ("the Sydney Opera House", "Australia"),
        ),
        (
            ("Actually, {CHAR} lives next to {1}.", "Who is at home in {1}?"),
            ("The flat of {CHAR} looks out on {1}.", "Which person has been to {1}?"),
            ("Every Tuesday, {CHAR} jogs around {1}.", "Who spends time in {1}?"),
            ("{CHAR} sells tickets at {1}.", "Who has a job in {1}?"),
        ),
    ),
    Relation(
        (
            ("oranges and lemons", "citrus"), ("beef and pork", "meat"), ("salmon and tuna", "fish"),
            ("cheese and butter", "milk products"), ("bread and noodles", "wheat"),
            ("almonds and walnuts", "nuts"), ("cake and chocolate", "sweets"),
        ),
        (
            ("Actually, {CHAR} does not eat {1}.", "Who avoids {1}?"),
            ("{CHAR} is allergic to {1}.", "Who cannot have {1}?"),
            ("The doctor told {CHAR} to stay away from {1}.", "Who must live without {1}?"),
            ("At dinner, {CHAR} always leaves {1} on the plate.", "Who dislikes {1}?"),
        ),
    ),
    Relation(
        (
            ("a violin and a cello", "a string instrument"),
            ("a flute and a clarinet", "a wind instrument"),
            ("a trumpet and a trombone", "a brass instrument"), ("a piano and an organ", "a keyboard"),
            ("a drum and a tambourine", "percussion"),
        ),
        (
            ("{CHAR} owns {1}.", "Who plays {1}?"),
            ("{CHAR} brought {1} to the rehearsal.", "Who performs on {1}?"),
            ("{CHAR} practices with {1} after school.", "Who is learning {1}?"),
            ("In the attic, {CHAR} stores {1}.", "Who knows how to handle {1}?"),
        ),
    ),
    Relation(
        (
            ("bread and rolls", "a baker"), ("shoes and boots", "a cobbler"),
            ("chairs and cupboards", "a carpenter"), ("suits and dresses", "a tailor"),
            ("rings and necklaces", "a jeweler"), ("pots and vases", "a potter"),
        ),
        (
            ("{CHAR} makes {1} for a living.", "Who works as {1}?"),
            ("People come to {CHAR} for {1}.", "Who was trained as {1}?"),
            ("{CHAR} learned how to produce {1}.", "Who became {1}?"),
            ("The window of {CHAR} is full of new {1}.", "Who earns money as {1}?"),
        ),
    ),
    Relation(
        (
            ("hens and ducks", "birds"), ("snakes and lizards", "reptiles"), ("bees and ants", "insects"),
            ("trout and carp", "fish"), ("frogs and toads", "amphibians"),
            ("oysters and mussels", "shellfish"),
        ),
        (
            ("{CHAR} keeps {1}.", "Who looks after {1}?"),
            ("{CHAR} has written a book about {1}.", "Who knows much of {1}?"),
            ("As a child, {CHAR} collected {1}.", "Who used to be fond of {1}?"),
            ("{CHAR} draws {1} very well.", "Who makes pictures of {1}?"),
        ),
    ),
    Relation(
        (
            ("a bat and wickets", "cricket"), ("a racket and shuttlecocks", "badminton"),
            ("goggles and fins", "diving"), ("a rope and crampons", "climbing"),
            ("clubs and tees", "golf"), ("a bow and arrows", "archery"),
        ),
        (
            ("{CHAR} packs {1}.", "Who goes in for {1}?"),
            ("For the birthday, {CHAR} got {1}.", "Who likes {1}?"),
            ("{CHAR} lent {1} to a cousin.", "Who does {1} at times?"),
            ("In the cellar, {CHAR} hung up {1}.", "Who has taken to {1}?"),
        ),
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Grammar:
    """Sentences of three parts, each drawn from a list."""

    subjects: tuple[str, ...]
    predicates: tuple[str, ...]
    adverbials: tuple[str, ...]

    def sentences(self) -> list[str]:
        """Return every sentence."""
        parts = (self.subjects, self.predicates, self.adverbials)
        return [f"{who} {what} {when}." for who in parts[0] for what in parts[1] for when in parts[2]]


FILLERS = {
    "landscape": Grammar(
        (
            "The ferry", "A long train", "The old clock", "Some fog", "The morning light", "A narrow path",
            "The wooden bridge", "A row of lamps", "The market hall", "An empty cart", "The river",
            "A low wall", "The garden gate", "A heavy rain", "The quiet street", "A paper kite",
            "The stone tower", "A small boat",
        ),
        (
            "stood in the shade", "was late again", "moved a little", "looked grey from here",
            "made hardly any noise", "was repaired last spring", "ended at the water", "came into view",
            "needed some care", "was no longer there", "turned towards the hills", "stayed where it was",
            "seemed larger than before", "could be heard at night",
        ),
        (
            "after the rain", "before noon", "in the opening week of the month", "on the way home",
            "for most of the day", "while the shops were closed", "as on any other day",
            "near the end of the season", "during the holidays", "for no special reason",
            "since the wind had changed", "as far as anyone could tell", "in the evening",
        ),
    ),
    "office": Grammar(
        (
            "The committee", "A short memo", "The annual budget", "The monthly review", "One of the forms",
            "The waiting list", "A revised draft", "The archive", "The help desk", "Their newsletter",
            "The schedule", "A missing signature", "The department", "An earlier version",
        ),
        (
            "caused some discussion", "went through without changes", "was postponed",
            "took longer than planned", "remained under review", "was sent around twice",
            "left several questions open", "had to be approved", "was filed under another heading",
            "needed one more signature", "attracted little interest", "was shortened",
        ),
        (
            "at the end of the quarter", "despite several reminders", "because of the new rules",
            "according to the minutes", "without further comment", "in the usual manner",
            "before the summer break", "as the guidelines require", "for technical reasons",
            "until further notice", "on short notice", "to everyone's surprise",
        ),
    ),
    "weather": Grammar(
        (
            "A thin layer of cloud", "The air pressure", "Light snow", "A warm current", "The humidity",
            "Thick mist", "The early frost", "A storm from the coast", "The drought", "A mild breeze",
            "The temperature", "Scattered hail", "The high tide", "Bright sunshine",
        ),
        (
            "is expected to return", "has hardly changed", "will reach the valleys",
            "kept the roads empty", "arrived sooner than forecast", "lasted several hours",
            "gave way to clearer skies", "is typical of these months", "caused only minor delays",
            "weakened over the plains", "surprised the observers", "is slowly increasing",
        ),
        (
            "by the middle of the week", "in most parts of the region", "along the shore",
            "for a few more days", "according to the stations", "at higher altitudes",
            "compared with recent years", "after a long calm", "throughout the weekend",
            "with little warning", "as the season goes on", "overnight",
        ),
    ),
    "manual": Grammar(
        (
            "The cooling fan", "The status light", "A spare fuse", "The power cable", "Each of the valves",
            "The safety cover", "The control panel", "A worn belt", "The intake filter", "The pump",
            "Every connector", "The main switch", "The backup battery", "This setting",
        ),
        (
            "should be checked", "can be replaced", "must stay dry", "is not part of the delivery",
            "may become hot", "has to be cleaned", "restarts by itself", "is described below",
            "works without supervision", "needs no further adjustment", "should never be covered",
            "is tested at the factory",
        ),
        (
            "before the machine is used again", "once a year", "after a long pause",
            "when the display says so", "with a soft cloth", "in normal operation",
            "unless the manual says otherwise", "by trained staff only", "within a few minutes",
            "at room temperature", "during maintenance", "as shown in the diagram",
        ),
    ),
}  # fmt: skip
"""Fillers by name; an item takes all its filler from one of them."""
