"""The tools that test the pages notice what they are there to notice."""

import pytest

from tests.docs.pages import ROOT, Block, blocks, commands, compare, run_command


def block(text, language="text", *directions):
    return Block(ROOT / "page.md", 1, language, directions, text)


def test_figures_and_white_space_may_differ():
    compare(block("step  1,000   loss 4.2e-01\n\n  50%"), "step 20 loss 1.5\n7.25%\n")


@pytest.mark.parametrize("name", ["Intel(R) Xeon(R) CPU @ 2.70GHz", "AMD EPYC 7B13", "Neoverse-N1", "aarch64"])
def test_the_processor_may_differ(name):
    compare(block("steps   on cpu (AMD EPYC), threads: 2\n"), f"steps on cpu ({name}), threads: 16\n")
    with pytest.raises(AssertionError):
        compare(block("steps   on cpu (AMD EPYC), threads: 2\n"), f"steps on cuda ({name}), threads: 16\n")


@pytest.mark.parametrize(
    "written", ["step 20 los 1.5\n", "step 20\n", "step 20 loss 1.5\nmore\n", "step loss 1.5\n", ""]
)
def test_anything_else_may_not(written):
    with pytest.raises(AssertionError, match=r"page\.md:1 shows"):
        compare(block("step 10 loss 0.5\n"), written)


def test_only_the_marked_lines_are_free():
    shown = block("best of 1\nsome text\nrun: a\n", "text", 'free "best" to "run:"')
    compare(shown, "best of 2\nquite\nanother text\nrun: a\n")
    with pytest.raises(AssertionError):
        compare(shown, "best of 2\nquite\nrun: b\n")
    with pytest.raises(AssertionError):
        compare(shown, "worst of 2\nquite\nrun: a\n")


def test_an_unknown_command_is_not_passed_over():
    with pytest.raises(AssertionError, match="neither run nor listed"):
        run_command("curl somewhere", block("curl somewhere\n", "sh"))


def test_a_pipe_joins_two_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("some text\n" * 100)
    line = "cat a.txt | fivestep data make - --out a.safetensors"
    assert "train: 900 tokens" in run_command(line, block(line, "sh"))


def test_a_failing_command_fails(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssertionError, match="no-such-recipe"):
        run_command("fivestep train no-such-recipe", block("", "sh"))


def test_a_page_is_read_in_order_with_its_directions(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# Page\n\n<!-- test: add --seed 1 | with bigram -> digits -->\n"
        "```sh\nfivestep train \\\n  bigram  # a comment\n```\n\ntext\n```text\n10\n```\n"
    )
    first, second = blocks(page)
    assert commands(first) == ["fivestep train    digits"]
    assert (first.direction("add"), first.direction("with"), first.line) == ("--seed 1", "bigram -> digits", 4)
    assert (second.language, second.directions, second.text) == ("text", (), "10\n")


def test_a_stand_in_for_what_is_not_there_fails():
    with pytest.raises(AssertionError, match="no '10' to replace"):
        block("max_iters = 5\n", "python", "with 10 -> 2").shortened()
