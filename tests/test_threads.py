"""CPU threads give way where another program is busy, and to nothing less."""

import pytest
import torch
from conftest import tiny

from training import threads, trainer

CPU = torch.device("cpu")


@pytest.fixture
def machine(monkeypatch):
    """Four threads, and what a row of operations takes with so many, as the test says."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    torch.set_num_threads(4)
    takes = {}
    monkeypatch.setattr(threads, "seconds", lambda count, most: takes[count])
    yield takes
    torch.set_num_threads(1)


def test_the_fastest_number_is_taken_where_it_is_worth_it(machine):
    chosen = threads.Threads(CPU)
    quiet, busy = {4: 1.0, 3: 1.25, 2: 1.8}, {4: 4.0, 3: 1.3, 2: 1.9}
    machine |= quiet
    assert chosen.choose() is None and torch.get_num_threads() == 4
    machine |= {4: 1.0, 3: 0.8}  # a moment's luck
    assert chosen.choose() is None and torch.get_num_threads() == 4
    machine |= busy
    assert (
        chosen.choose() == "CPU threads: 3 of 4, faster now than all (is another program busy?)"
        and torch.get_num_threads() == 3
    )
    assert chosen.choose() is None and torch.get_num_threads() == 3
    machine |= {4: 0.9, 3: 1.25}
    assert chosen.choose() == "CPU threads: 4 of 4" and torch.get_num_threads() == 4


def test_a_number_that_is_asked_for_stays(machine, monkeypatch):
    machine |= {4: 4.0, 3: 1.3, 2: 1.0}
    for device in (torch.device("cuda"), torch.device("mps")):
        assert threads.Threads(device).choose() is None
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert threads.Threads(CPU).choose() is None and torch.get_num_threads() == 4


def test_trying_moves_nothing_of_the_run():
    torch.set_num_threads(2)
    state = torch.get_rng_state()
    assert all(0 < threads.seconds(count, 2) < 5 for count in (1, 2))
    assert torch.equal(state, torch.get_rng_state())


def test_a_run_says_that_it_gives_way_and_that_it_no_longer_does(machine, tmp_path, capsys, monkeypatch):
    busy, quiet = {4: 4.0, 3: 1.3, 2: 1.9}, {4: 1.0, 3: 1.6, 2: 1.9}
    machine |= busy
    real = trainer.Trainer.write_log

    def quiet_from_the_second_entry_on(self, batch):
        machine.update(quiet if self.train_step.step >= 4 else busy)
        real(self, batch)

    monkeypatch.setattr(trainer.Trainer, "write_log", quiet_from_the_second_entry_on)
    trainer.train(tiny(tmp_path, train={"steps": 6, "log_every": 2}))
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("CPU threads")]
    assert said == ["CPU threads: 3 of 4, faster now than all (is another program busy?)", "CPU threads: 4 of 4"]
