"""Whether two runs come from one pair of trainings, from their records (`run.json`).

Two runs are one pair if pack, start checkpoint, seed, model, schedule and layout agree and only the token
weighting may differ. Where training went on from a checkpoint of an earlier run of the same arm (a later
stage, instruction tuning), the start checkpoints differ as they must; then the records of these earlier
runs, `start_checkpoint.run`, are compared in the same way, back to the common start.
"""

from __future__ import annotations

import json
from typing import Any

NEEDED = ("fingerprint", "start_checkpoint", "seed", "schedule")
"""Without these nobody can say that two runs are one pair."""
COMPARED = ("fingerprint", "row_tokens", "seed", "model", "export_iteration")
NOT_IN_WEIGHTS = ("eval_iters", "eval_interval")
"""Parts of the schedule that nothing in the weights depends on."""
ONLY_AT_START = ("finetune",)
"""Parts that say what is loaded at the start; flags of a resumed job may differ."""
SHOWN_CHARACTERS = 60


def first_difference(before: dict[str, Any], after: dict[str, Any]) -> str | None:
    """The first thing in which two records disagree, in words; keys that one of them lacks are left out."""
    for key in COMPARED:
        if key in before and key in after and before[key] != after[key]:
            return _in_words(key, before[key], after[key])
    for key in ("schedule", "layout"):
        if key in before and key in after:
            one, other = _history(before, key), _history(after, key)
            if not _agree(one, other):
                return _changed(key, one, other)
    if "start_checkpoint" in before and "start_checkpoint" in after:
        return _start_difference(before["start_checkpoint"], after["start_checkpoint"])
    return None


def _start_difference(before: dict[str, Any] | None, after: dict[str, Any] | None) -> str | None:
    """What differs between two start checkpoints, None standing for random weights."""
    if before is None or after is None:
        if before is after:
            return None
        return _in_words("start_checkpoint", _identity(before), _identity(after))
    if _identity(before) == _identity(after):
        return None
    earlier, other = before.get("run"), after.get("run")
    if earlier and other and before.get("iteration") == after.get("iteration"):
        difference = first_difference(earlier, other)
        return f"in the training before, {difference}" if difference is not None else None
    return _in_words("start_checkpoint", _identity(before), _identity(after))


def _identity(start: dict[str, Any] | None) -> Any:
    return None if start is None else {key: start.get(key) for key in ("iteration", "sha256")}


def unproved_pair(before: dict[str, Any], after: dict[str, Any]) -> str | None:
    """Why two records that do not disagree do not prove a pair, in words; None if they do."""
    if any(key not in record for record in (before, after) for key in NEEDED):
        return f"the records do not both name {', '.join(NEEDED)}"
    return _unproved_start(before, after)


def _unproved_start(before: dict[str, Any], after: dict[str, Any]) -> str | None:
    """Why start checkpoints that do not disagree prove nothing; None where they prove the pair."""
    one, other = before.get("start_checkpoint"), after.get("start_checkpoint")
    if one is None or other is None:
        return None  # both from the random weights of one seed
    if one.get("sha256") is None:
        return "their start checkpoints have no hash"
    if one.get("sha256") == other.get("sha256"):
        return None
    earlier = one["run"], other["run"]
    if any(key not in record for record in earlier for key in NEEDED):
        return "the records of the training before are not complete"
    return _unproved_start(*earlier)


def _history(record: dict[str, Any], key: str) -> list[tuple[int, Any]]:
    """[(iteration from which it held, value)]: a resume that changed nothing leaves no trace."""
    history: list[tuple[int, Any]] = [(0, _relevant(record[key], NOT_IN_WEIGHTS))]
    for resume in record.get("resumes") or []:
        now = _relevant(resume.get(key, record[key]), NOT_IN_WEIGHTS)
        if _relevant(now, ONLY_AT_START) != _relevant(history[-1][1], ONLY_AT_START):
            history.append((resume.get("iteration", 0), now))
    return history


def _agree(one: list[tuple[int, Any]], other: list[tuple[int, Any]]) -> bool:
    if [iteration for iteration, _ in one] != [iteration for iteration, _ in other]:
        return False
    return all(not _disagreeing(mine, its) for (_, mine), (_, its) in zip(one, other, strict=True))


def _disagreeing(before: Any, after: Any) -> list[str]:
    """Names in which two dictionaries differ; one that a side lacks was unknown to its version."""
    if not (isinstance(before, dict) and isinstance(after, dict)):
        return [] if before == after else [""]
    return [name for name in before if name in after and before[name] != after[name]]


def _relevant(value: Any, left_out: tuple[str, ...]) -> Any:
    if not isinstance(value, dict):
        return value
    return {name: item for name, item in value.items() if name not in left_out}


def _changed(key: str, one: list[tuple[int, Any]], other: list[tuple[int, Any]]) -> str:
    (_, before), (_, after) = one[0], other[0]
    names = _disagreeing(before, after)
    if not names:
        return f"their {key} was changed at other iterations, or to something else, by a resume"
    if not names[0]:
        return _in_words(key, before, after)
    return _in_words(f"{key}.{names[0]}", before[names[0]], after[names[0]])


def _in_words(key: str, before: Any, after: Any) -> str:
    return f"{key} is {_short(before)} and {_short(after)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."
