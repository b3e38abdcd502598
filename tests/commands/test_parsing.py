import pytest

from gesso.commands.parsing import option_value


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["a", "--out", "b", "c"], "b"),
        (["a", "--out=b"], "b"),
        (["--out=b=c"], "b=c"),
        (["--out", "b", "--out", "c"], "c"),
        (["--output", "b", "--out"], None),
        ([], None),
    ],
)
def test_option_value(words, value):
    assert option_value(words, "--out") == value


@pytest.mark.parametrize("form", ["--out={}", "--out {}"])
def test_a_resume_knows_the_options_of_its_run_however_out_is_written(gesso, tmp_path, form):
    out = form.format(tmp_path / "run").split()
    words = ("train", "debug:tiny", *out, "--device", "cpu", "--training.steps", "1", "--training.batch-size", "2")
    first = gesso.json(*words, "--data.embedded-val", "1")
    assert gesso.json("train", "debug:tiny", *out, "--resume")["scores"] == first["scores"]
