"""Test the command-line arguments of the tools that read text."""

import argparse

import pytest

from hypermoe_ds.data.arguments import add_input_arguments, percentage, read_options


def options_of(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_input_arguments(parser)
    return parser.parse_args(["--input", "a.txt", *words])


@pytest.mark.parametrize(("given", "separator"), [(r"\n\n", "\n\n"), (r"\f", "\f"), ("<|end|>", "<|end|>")])
def test_a_separator_may_contain_escapes(given: str, separator: str) -> None:
    assert read_options(options_of("--document-separator", given)).separator == separator


def test_an_empty_separator_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        options_of("--document-separator", "")
    assert ended.value.code == 2
    assert "--document-separator: an empty text separates no documents; omit the option" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "share"), [("1%", 0.01), ("0.5%", 0.005), ("0%", 0)])
def test_a_percentage_is_a_share(text: str, share: float) -> None:
    assert percentage(text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["1", "", "%", "x%", "1%%"])
def test_a_share_without_a_percent_sign_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not a percentage"):
        percentage(text)
