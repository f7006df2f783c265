"""The TOML file of an experiment: what it may say, and how a mistake is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_exact.experiments.definition import read_experiment_file, suite_lengths

ROOT = Path(__file__).resolve().parents[3]
SHIPPED = sorted((ROOT / "examples" / "experiments").glob("*.toml"))
GOOD = """
name = "small"
seeds = [1, 2]
[model]
hf = "models/small"
[[corpora]]
name = "web"
input = ["web.jsonl"]
[[stages]]
row_tokens = "4K"
[[arms]]
name = "standard"
rule = "none"
[[arms]]
name = "position"
rule = "packed-position"
alpha = 0.3
match_mass = "exact"
[[suites]]
name = "ruler"
lengths = ["2K", "4K", "8K"]
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "experiment.toml"
    path.write_text(text)
    return path


def test_a_file_is_read_as_values(tmp_path: Path) -> None:
    found = read_experiment_file(written(tmp_path, GOOD))
    assert found.seeds == (1, 2)
    assert found.row_lengths() == [4096]
    assert found.packs_differ_by_seed()
    assert found.arms[1].parameters == {"alpha": 0.3, "match_mass": "exact"}
    assert suite_lengths(found.suites[0], 4096) == {"trained": ["2K", "4K"], "extrapolated": ["8K"]}
    assert found.title == "small"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_files_are_read(path: Path) -> None:
    found = read_experiment_file(path)
    assert found.arms[0].rule == "none"
    if found.training.recipe is not None:
        windows = suite_lengths(found.suites[0], max(found.row_lengths()))
        assert all(windows.values())


def test_the_shipped_files_cover_the_seven_models_and_both_small_ones() -> None:
    names = {read_experiment_file(path).title for path in SHIPPED}
    assert names == {
        *("Qwen2.5-0.5B", "Qwen2.5-1.5B", "Qwen2.5-3B", "Qwen2.5-7B"),
        *("LLaMA-3.2-1B", "LLaMA-3.2-3B", "LLaMA-3.1-8B", "miniature", "SmolLM2-135M"),
        *("miniature-evidence", "miniature-evidence-near"),
    }


def test_windows_of_the_paper(tmp_path: Path) -> None:
    text = GOOD.replace('["2K", "4K", "8K"]', '"paper:llama-3.1-8b"')
    (suite,) = read_experiment_file(written(tmp_path, text)).suites
    assert suite_lengths(suite, 16384)["extrapolated"][-1] == "64K"


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('name = "small"', 'nam = "small"', r"experiment\.toml lacks name: correct it"),
        ("seeds = [1, 2]", "seeds = [1, 2]\nsed = 1", r"has unknown sed: it knows name, seeds, model"),
        ("seeds = [1, 2]", "seeds = [1, 1]", r"experiment\.toml: seeds are \[1, 1\]: give at least one"),
        ("seeds = [1, 2]", 'seeds = ["a"]', r"seeds\[0\] is 'a', where int is needed"),
        ("seeds = [1, 2]", "seeds = 1", r"seeds is 1, where a list is needed"),
        ("seeds = [1, 2]", "seeds = [1, 2", r"experiment\.toml is not TOML"),
        ('hf = "models/small"', "hf = 3", r"model: hf is 3, where str is needed"),
        ('input = ["web.jsonl"]', "", r"corpus web has no source: give exactly one of input, hub"),
        ('row_tokens = "4K"', 'row_tokens = "4Q"', r"row_tokens: '4Q' is not a whole number"),
        ("[[stages]]", '[training]\nrecipe = "qwen2.5_0.5b_4k"\n[[stages]]', "both a recipe and"),
        ("alpha = 0.3", 'alpha = "big"', r"arm position: alpha is 'big', where a number is needed"),
        ("alpha = 0.3", "alfa = 0.3", r"arm position has unknown alfa: packed-position reads alpha"),
        ('rule = "none"', 'rule = "none"\nalpha = 1.0', r"gives alpha = 1\.0, which none does not read"),
        ('rule = "none"', 'rule = "no"', r"unknown token weighting 'no': choose one of none"),
        (
            'rule = "packed-position"',
            'rule = "exact-evidence"',
            "exact-evidence needs the scores of every pack",
        ),
        ('name = "position"', 'name = "standard"', r"\[\[arms\]\] has 'standard' twice"),
        ('name = "position"', 'name = "../x"', r"name '\.\./x' cannot be a folder"),
        ('name = "ruler"', 'name = "rules"', r"\[\[suites\]\] name is 'rules': choose one of"),
        (
            '["2K", "4K", "8K"]',
            '"paper:gpt"',
            r"the paper has no model 'gpt': choose one of Qwen2\.5-0\.5B",
        ),
        ('["2K", "4K", "8K"]', '"4K"', r'lengths is \'4K\'; write a list, or "paper:MODEL"'),
        ('["2K", "4K", "8K"]', "[]", r"\[\[suites\]\] ruler needs lengths"),
        ('["2K", "4K", "8K"]', '["2Q"]', r"'2Q' is not a length such as"),
        (
            'row_tokens = "4K"',
            'row_tokens = "4K"\n[[stages]]\nrow_tokens = 4096',
            "rows of 4,096 tokens twice",
        ),
        (
            'row_tokens = "4K"',
            'row_tokens = "4K"\n[training]\narguments = ["--seed", "7"]',
            "has --seed, which",
        ),
        (
            'rule = "none"',
            'rule = "none"\narguments = ["--lr=1e-4"]',
            "has --lr, in which arms must not differ",
        ),
        ("alpha = 0.3", "tau = [512, 1024]", "tau has 2 values for 1 stages"),
        ("alpha = 0.3", "tau = []", "tau has 0 values for 1 stages"),
        ('name = "web"', 'name = "web"\narguments = ["--input", "x"]', "corpus web: arguments has --input"),
        (
            'name = "ruler"',
            'name = "ruler"\narguments = ["--lengths", "4K"]',
            "ruler arguments has --lengths",
        ),
        ("[model]", "[machine]\nassumed_mfu = 40.0\n[model]", "assumed_mfu is 40: give a share"),
        ("[model]", "[machine]\npeak_tflops = 0.0\n[model]", "peak_tflops is 0: give a number above 0"),
        ("[model]", "[machine]\nevaluation_nodes = 0\n[model]", "evaluation_nodes is 0: give 1 or more"),
        ("[model]", '[machine]\nkind = "slurm"\nsbatch = "-p \'x"\n[model]', "close the quote"),
        ("[model]", "[scores]\n[model]", r"\[scores\], but no arm reads them: give one a rule such as"),
        (
            "[model]",
            '[[arms]]\nname = "d"\nrule = "dense"\n[scores]\nmodel = "arm:d"\n[model]',
            r"\[scores\] model is arm d, which is trained with these scores",
        ),
        (
            "[model]",
            '[[arms]]\nname = "d"\nrule = "dense"\n[scores]\nmodel = "arm:e"\n[model]',
            r"\[scores\] model is 'arm:e': there is no such arm",
        ),
        (
            "[model]",
            '[comparison]\nalso_against = ["standard"]\n[model]',
            "also_against has 'standard': name arms other than the first",
        ),
        ("[model]", '[machine]\nsbatch = "-p x"\n[model]', 'sbatch is for kind = "slurm"'),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, before: str, after: str, message: str) -> None:
    assert before in GOOD
    path = written(tmp_path, GOOD.replace(before, after, 1))
    with pytest.raises(ValueError, match=message) as caught:
        read_experiment_file(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            '[[corpora]]\nname = "own"\ninput = ["x"]\n',
            r"'own' is not in the mix of llama3\.2_1b_4k \(fineweb-edu\)",
        ),
        ("[packing]\nseed = 7\n", r"\[packing\] with a recipe, which decides the packs"),
        (
            '[[corpora]]\nname = "own"\nweight = 2.0\ninput = ["x"]\n',
            "weight with a recipe, which has shares",
        ),
    ],
)
def test_a_recipe_leaves_no_key_unread(tmp_path: Path, more: str, message: str) -> None:
    text = next(path for path in SHIPPED if path.stem == "llama3.2_1b").read_text()
    with pytest.raises(ValueError, match=message):
        read_experiment_file(written(tmp_path, text.replace("[training]", f"{more}[training]")))


def test_weights_of_some_corpora_are_an_error(tmp_path: Path) -> None:
    more = '[[corpora]]\nname = "own"\nweight = 2.0\ninput = ["x"]\n'
    with pytest.raises(ValueError, match="give a weight to all of them or to none"):
        read_experiment_file(written(tmp_path, GOOD.replace("[[stages]]", f"{more}[[stages]]")))
