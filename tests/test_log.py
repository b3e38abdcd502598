import logging

import pytest

from gesso import log
from gesso.cli import main


@pytest.fixture
def handler(monkeypatch):
    """Takes the handler on standard error off, before and after."""
    root = logging.getLogger("gesso")

    def off():
        for found in [h for h in root.handlers if getattr(h, "gesso_stderr", False)]:
            root.removeHandler(found)

    off()
    yield
    off()


@pytest.mark.parametrize(("rank", "shown", "before"), [(None, 2, ""), ("0", 2, ""), ("3", 1, "[rank 3] ")])
def test_processes_above_0_say_warnings_alone_with_their_number(handler, monkeypatch, capsys, rank, shown, before):
    monkeypatch.delenv("RANK", raising=False) if rank is None else monkeypatch.setenv("RANK", rank)
    log.to_stderr()
    log.get_logger("here").info("all is well")
    log.get_logger("here").warning("look out")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == shown and lines[-1].endswith(f" W {before}look out")


@pytest.mark.parametrize(("rank", "before"), [("0", ""), ("2", "[rank 2] ")])
def test_each_process_tells_its_own_mistake_and_only_the_first_a_result(handler, monkeypatch, capsys, rank, before):
    monkeypatch.setenv("RANK", rank)
    assert main(["--version"]) == 0
    assert bool(capsys.readouterr().out) == (rank == "0")
    assert main(["trian"]) == 2
    assert capsys.readouterr().err.startswith(f"gesso: {before}unknown command 'gesso trian'")
