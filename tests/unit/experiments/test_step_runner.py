"""Plans of experiments, and running them: order, resume, refusals. Commands are not run here."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_exact.experiments.definition import read_experiment_file
from megatron_exact.experiments.experiment_plan import KINDS, ExperimentStep, Planner
from megatron_exact.experiments.step_runner import StepRunner, describe_plan
from tests.unit.experiments.test_definition import GOOD, SHIPPED

PROBE = '[probe]\nitems = "{made}/questions.jsonl"\nrange = ["192", "384"]\n'
TUNED = '[tuning]\ninput = ["answers.jsonl"]\n'


class Tools:
    """Stands in for the tools: makes the files of the step whose command is called, or fails."""

    def __init__(self, runner_steps: Sequence[ExperimentStep], fail_at: str | None = None) -> None:
        self.makes = {command: step for step in runner_steps for command in step.commands}
        self.fail_at = fail_at
        self.called: list[str] = []
        self.submits = False

    def __call__(self, command: Sequence[str], log: Path) -> int:
        words = tuple(command)
        step = self.makes.get(words)
        name = step.name if step is not None else "report"
        self.called.append(name)
        with log.open("a") as stream:
            stream.write(f"working on {name}\n")
            if name == self.fail_at:
                stream.write("error: disk full: make room\n")
                return 1
        if self.submits and words[0] == "sbatch":
            with log.open("a") as stream:
                stream.write("4711\n")
            return 0
        for path in () if step is None else step.makes:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("{}")
        if step is None:
            folder = Path(words[words.index("--output") + 1])
            (folder / "report.html").write_text("<html>")
        return 0


class Bench:
    """An experiment in a folder of its own, with its inputs there."""

    queue: tuple[str, ...] = ("4711",)
    """Numbers of the jobs that wait or run."""

    def __init__(self, root: Path, text: str = GOOD) -> None:
        self.file = root / "experiment.toml"
        (root / "models" / "small").mkdir(parents=True)
        for name in ("web.jsonl", "answers.jsonl"):
            (root / name).write_text("")
        text = text.replace("models/small", str(root / "models" / "small"))
        for name in ("web", "answers"):
            text = text.replace(f'"{name}.jsonl"', f'"{root / name}.jsonl"')
        self.file.write_text(text)
        self.output = root / "out"
        self.lines: list[str] = []

    def runner(self, fail_at: str | None = None) -> tuple[StepRunner, Tools]:
        planner = Planner(read_experiment_file(self.file), self.output)
        tools = Tools(planner.steps(), fail_at)
        runner = StepRunner(
            *(planner, self.file),
            call=tools,
            is_queued=lambda job: job in self.queue,
            say=self.lines.append,
        )
        return runner, tools


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr("megatron_exact.experiments.table_one.read_comparison", lambda path: NOTHING)
    return Bench(tmp_path)


NOTHING: dict[str, list[str]] = {"aggregates": [], "runs": []}


def test_steps_stand_after_what_they_need(tmp_path: Path) -> None:
    bench = Bench(tmp_path, GOOD + TUNED + PROBE)
    steps = bench.runner()[0].steps
    made: set[Path] = set()
    for step in steps:
        ours = [path for path in step.needs if path.is_relative_to(bench.output)]
        assert made.issuperset(path for path in ours if path.name != "questions.jsonl"), step.name
        made.update(step.makes)
    kinds = [step.kind for step in steps]
    assert set(kinds) == {*KINDS} - {"score"}
    assert kinds.count("train") == kinds.count("export-tuned") == 4  # two arms, two seeds
    names = [step.name for step in steps]
    assert len(set(names)) == len(names)


def test_commands_are_those_of_the_tools(bench: Bench) -> None:
    steps = {step.name: step for step in bench.runner()[0].steps}
    (train,) = steps["train:seed-2/position"].commands
    text = " ".join(train)
    assert text.startswith("megatron-exact stages --start ")
    for words in ("--arms packed-position", "--seed 2", "--alpha 0.3", "--match-mass exact"):
        assert words.replace("--alpha", "--exact-alpha") in text
    (compared,) = steps["compare:position"].commands
    text = " ".join(compared)
    assert "--trained-lengths 2K,4K --extrapolated-lengths 8K" in text
    baselines = text.split("--treatment")[0]
    assert "seed-1/standard" in baselines
    assert "seed-2/standard" in baselines


def test_arms_are_compared_with_other_arms_too(tmp_path: Path) -> None:
    more = '[[arms]]\nname = "exact"\nrule = "exact"\n[comparison]\nalso_against = ["exact"]\n'
    bench = Bench(tmp_path, GOOD + PROBE + more)
    steps = {step.name: step for step in bench.runner()[0].steps}
    assert {name for name in steps if name.startswith("compare:")} == {
        *("compare:position", "compare:position-probe", "compare:exact", "compare:exact-probe"),
        *("compare:position-against-exact", "compare:position-against-exact-probe"),
    }
    (compared,) = steps["compare:position-against-exact-probe"].commands
    baselines, treatments = " ".join(compared).split("--treatment")
    assert baselines.count("/exact ") == treatments.count("/position ") == 2
    (report,) = steps["report"].commands
    assert f"{bench.output}/comparisons/position-against-exact-probe" in " ".join(report)


def test_packs_are_scored_for_the_arms_that_read_scores(tmp_path: Path) -> None:
    more = '[scores]\nmodel = "arm:standard"\narguments = ["--short-window", "1K"]\n'
    more += '[[arms]]\nname = "ours"\nrule = "exact-evidence"\n'
    bench = Bench(tmp_path, GOOD + more)
    steps = {step.name: step for step in bench.runner()[0].steps}
    names = list(steps)
    assert names.index("export:seed-2/standard") < names.index("score:seed-2/4k")
    assert names.index("score:seed-2/4k") < names.index("train:seed-1/ours")
    (command,) = steps["score:seed-2/4k"].commands
    text = " ".join(command)
    assert f"--pack {bench.output}/packs/seed-2/4k --model {bench.output}/models/seed-2/standard" in text
    assert text.endswith("--short-window 1K")
    (train,) = steps["train:seed-2/ours"].commands
    assert train[-2:] == ("--confidence-scores", f"{bench.output}/scores/seed-2/4k")
    assert "--confidence-scores" not in steps["train:seed-2/position"].commands[0]
    made: set[Path] = set()
    for step in steps.values():
        assert made.issuperset(path for path in step.needs if path.is_relative_to(bench.output)), step.name
        made.update(step.makes)


def test_losses_are_those_of_runs_that_have_ended(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    runner, _ = bench.runner()
    report = next(step for step in runner.steps if step.kind == "report")
    losses = [command for command in report.commands[0] if command == "--losses"]
    assert len(losses) == 2  # one arm besides the first, two seeds
    running = bench.output / "runs" / "seed-2" / "position"

    def status(folder: Path) -> SimpleNamespace:
        return SimpleNamespace(state="running" if folder.is_relative_to(running) else "finished")

    monkeypatch.setattr("megatron_exact.experiments.step_runner.read_status", status)
    for word in report.commands[0]:
        if "/runs/" in word:
            Path(word).mkdir(parents=True, exist_ok=True)
            (Path(word) / "evaluations.jsonl").write_text("")
    (kept,) = runner._of_what_is_there(report).commands
    assert kept.count("--losses") == 1
    assert "--comparison" not in kept  # none was made yet
    assert str(running) not in " ".join(kept)


def test_every_command_parses(tmp_path: Path) -> None:
    """Each command of a plan against the parser of its verb."""
    from megatron_exact.cli import VERBS

    bench = Bench(tmp_path, GOOD + TUNED + PROBE)
    plans = [bench.runner()[0].steps]
    plans += [Planner(read_experiment_file(path), tmp_path / "o").steps() for path in SHIPPED]
    seen = set()
    for step in (step for steps in plans for step in steps):
        for program, *words in step.commands:
            if program == "megatron-exact":
                verb = VERBS[words[0]]
                _, others = verb.parser("prog").parse_known_args(words[1:])
                if verb.name not in ("stages", "fine-tune"):  # they pass flags on to the job
                    assert not others, (step.name, others)
                seen.add(verb.name)
    assert seen == {
        *("import-hf", "tokenize", "pack", "stages", "export-hf", "probe", "pack-qa", "fine-tune"),
        *("score", "evaluate", "compare", "report"),
    }


def test_a_finished_experiment_runs_nothing_but_table_and_report(bench: Bench) -> None:
    runner, tools = bench.runner()
    assert runner.run()
    assert [name.split(":")[0] for name in tools.called][:3] == ["import", "corpus", "pack"]
    ledger = json.loads((bench.output / "ledger.json").read_text())
    assert {step["state"] for step in ledger["steps"].values()} == {"finished"}
    runner, tools = bench.runner()
    assert runner.run()
    assert tools.called == ["report"]
    with (bench.output / "table1.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["benchmark"], row["regime"], row["state"]) for row in rows] == [
        ("nolima", "trained", "not run"),
        ("nolima", "extrapolated", "not run"),
        ("ruler", "trained", "not run"),
        ("ruler", "extrapolated", "not run"),
        ("qa", "all", "not run"),
    ]


def test_a_failure_names_its_cause_and_is_continued(bench: Bench) -> None:
    runner, tools = bench.runner(fail_at="train:seed-1/position")
    with pytest.raises(
        ValueError, match=r"train:seed-1/position failed .* disk full: make room .*continues"
    ):
        runner.run()
    entry = json.loads((bench.output / "ledger.json").read_text())["steps"]["train:seed-1/position"]
    assert entry["state"] == "failed"
    runner, tools = bench.runner()
    assert runner.run()
    assert tools.called[0] == "train:seed-1/position"
    assert "import" not in tools.called


def test_leftovers_of_an_interrupted_step_are_removed(bench: Bench) -> None:
    runner, _ = bench.runner(fail_at="pack:seed-1/4k")
    with pytest.raises(ValueError, match="pack:seed-1/4k failed"):
        runner.run()
    leftover = bench.output / "packs" / "seed-1" / "4k" / "train"
    leftover.mkdir(parents=True)
    runner, _ = bench.runner()
    assert runner.run("corpus,pack")
    assert not leftover.exists()


def test_another_definition_in_the_same_folder_is_an_error(bench: Bench) -> None:
    assert bench.runner()[0].run()
    bench.file.write_text(bench.file.read_text().replace("alpha = 0.3", "alpha = 0.5"))
    runner, tools = bench.runner()
    with pytest.raises(ValueError, match=r"train:seed-1/position was run by another definition .*0\.3"):
        runner.run()
    assert not tools.called


def test_what_follows_another_definition_is_not_reused(bench: Bench) -> None:
    """A corpus that is made again, as its error says, leaves no pack or model of the old one."""
    assert bench.runner()[0].run()
    before = bench.file.read_text()
    bench.file.write_text(before.replace('name = "web"', 'name = "web"\narguments = ["--no-bos"]'))
    ledger = json.loads((bench.output / "ledger.json").read_text())
    for seed in (1, 2):
        del ledger["steps"][f"corpus:seed-{seed}/web"]
    (bench.output / "ledger.json").write_text(json.dumps(ledger))
    with pytest.raises(
        ValueError, match=r"pack:seed-1/4k was run by another definition .*steps that follow"
    ):
        bench.runner()[0].run()


def test_steps_follow_inputs_that_were_made_again(bench: Bench) -> None:
    assert bench.runner()[0].run()
    (bench.output / "corpora" / "seed-2" / "web" / "tokens.idx").unlink()
    runner, tools = bench.runner()
    assert runner.run()
    again = {name for name in tools.called if "seed-" in name}
    assert {"corpus:seed-2/web", "pack:seed-2/4k", "train:seed-2/standard"} <= again
    assert {"export:seed-2/position", "evaluate:seed-2/position/ruler"} <= again
    assert not any("seed-1" in name for name in again)
    assert "compare:position" in tools.called


def test_seeds_and_suites_are_added(bench: Bench) -> None:
    """Only what is new runs, and the comparison over all."""
    assert bench.runner()[0].run()
    text = bench.file.read_text().replace("seeds = [1, 2]", "seeds = [1, 2, 3]")
    bench.file.write_text(text.replace("[[suites]]", '[[suites]]\nname = "qa"\n[[suites]]', 1))
    runner, tools = bench.runner()
    assert runner.run()
    old = [name for name in tools.called if "seed-1" in name or "seed-2" in name]
    assert all(name.endswith("/qa") for name in old)
    assert "train:seed-3/position" in tools.called
    assert tools.called.count("compare:position") == 1


def test_options_of_sbatch_do_not_make_another_definition(bench: Bench) -> None:
    bench.file.write_text(bench.file.read_text() + "[machine]\nprocesses = 8\n")
    assert bench.runner()[0].run()
    slurm = '[machine]\nkind = "slurm"\nsbatch = "--time=9:00:00"\n'
    bench.file.write_text(bench.file.read_text().replace("[machine]\n", slurm))
    runner, tools = bench.runner()
    assert runner.run()
    assert tools.called == ["report"]


def test_cells_of_nolima_are_files(tmp_path: Path) -> None:
    """A folder that a running job has begun is not a finished suite."""
    for more, tokens in (("", 4000), ('\narguments = ["--nolima-protocol", "window"]', 4096)):
        text = GOOD.replace(
            'name = "ruler"\nlengths = ["2K", "4K", "8K"]', f'name = "nolima"\nlengths = ["4K"]{more}'
        )
        path = tmp_path / "experiment.toml"
        path.write_text(text)
        planner = Planner(read_experiment_file(path), tmp_path / "out")
        step = next(step for step in planner.steps() if step.kind == "evaluate")
        cells = [made for made in step.makes if "nolima" in made.parts]
        assert cells
        assert {made.name for made in cells} == {f"{tokens}.jsonl"}


def test_flags_that_win_over_a_recipe_change_the_hours(tmp_path: Path) -> None:
    path = next(path for path in SHIPPED if path.stem == "llama3.2_1b")
    text = path.read_text()
    own = tmp_path / "own.toml"

    def hours(arguments: str) -> float | None:
        own.write_text(text.replace('recipe = "llama3.2_1b_4k"', f'recipe = "llama3.2_1b_4k"\n{arguments}'))
        return Planner(read_experiment_file(own), tmp_path / "out").cost().gpu_hours_training

    usual = hours("")
    assert usual is not None
    assert hours('arguments = ["--train-iters", "1024", "--global-batch-size", "256"]') == pytest.approx(
        usual
    )
    assert hours('arguments = ["--train-iters=2048", "--global-batch-size=256"]') == pytest.approx(
        2 * usual
    )
    assert hours('arguments = ["--train-iters", "2048"]') is None


def test_only(bench: Bench) -> None:
    runner, tools = bench.runner()
    with pytest.raises(ValueError, match="--only trian: no such step; kinds are import, corpus, pack"):
        runner.run("trian")
    with pytest.raises(ValueError, match=r"needs .*, which is not finished: run that step, too"):
        runner.run("export")
    assert not tools.called
    assert runner.run("import,corpus:seed-1/web")
    assert tools.called == ["import", "corpus:seed-1/web"]


def test_a_missing_input_is_named_before_anything_runs(bench: Bench) -> None:
    bench.file.write_text(bench.file.read_text().replace("web.jsonl", "wob.jsonl"))
    runner, tools = bench.runner()
    with pytest.raises(ValueError, match=r"wob\.jsonl \(for corpus:seed-1/web\): does not exist"):
        runner.run()
    assert not tools.called
    assert any("# missing: " in line and "wob.jsonl" in line for line in describe_plan(runner))


def test_a_dry_run_shows_commands_costs_and_writes_nothing(tmp_path: Path) -> None:
    path = next(path for path in SHIPPED if path.stem == "llama3.1_8b")
    runner = StepRunner(Planner(read_experiment_file(path), tmp_path / "out"), path)
    lines = describe_plan(runner)
    assert not (tmp_path / "out").exists()
    assert sum(line.startswith("megatron-exact stages --recipe llama3.1_8b_16k") for line in lines) == 7
    hours = next(line for line in lines if "GPU-hours of training" in line)
    # 7 arms, 3 stages of 2^30 tokens, 6 FLOPs for each of 7.5e9 weights and token, attention on top
    least = 7 * 3 * 2**30 * 6 * 7.5e9 / (989e12 * 0.4 * 3600)
    value = float(hours.split(": ")[1].split(" ")[0].replace(",", ""))
    assert least < value < 1.3 * least
    assert any(line.startswith("# disk: ") for line in lines)


def test_jobs_are_submitted_and_waited_for(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.file.write_text(
        bench.file.read_text() + '[machine]\nkind = "slurm"\nsbatch = "--partition=gpu"\nprocesses = 8\n'
    )
    runner, tools = bench.runner()
    steps = {step.name: step for step in runner.steps}
    assert "--sbatch=--partition=gpu" in steps["train:seed-1/position"].commands[0]
    assert steps["evaluate:seed-1/position/ruler"].commands[0][0] == "sbatch"
    monkeypatch.setattr("megatron_exact.experiments.step_runner.read_status", lambda run: Status("running"))
    assert not runner.run()
    assert sum(name.startswith("train:") for name in tools.called) == 4
    assert not any(name.startswith("export:") for name in tools.called)
    assert "wait for jobs" in bench.lines[-1]
    monkeypatch.setattr(
        "megatron_exact.experiments.step_runner.read_status", lambda run: Status("finished")
    )
    runner, tools = bench.runner()
    tools.submits = True
    assert not runner.run()
    assert any(name.startswith("export:") for name in tools.called)
    assert sum(name.startswith("evaluate:") for name in tools.called) == 4
    assert not any(name.startswith("compare:") for name in tools.called)
    runner, tools = bench.runner()
    assert not runner.run()
    assert not any(name.startswith("evaluate:") for name in tools.called)  # still in the queue
    monkeypatch.setattr(Bench, "queue", ())
    runner, tools = bench.runner()
    assert not runner.run()  # submitted again, since the jobs left no cells
    runner, tools = bench.runner()
    assert runner.run()
    assert sum(name.startswith("compare:") for name in tools.called) == 1


class Status:
    """The state of a run."""

    def __init__(self, state: str) -> None:
        self.state = state
