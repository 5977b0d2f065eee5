"""How many CPU threads compute: all, or fewer while another program keeps cores busy."""

import os
import time

import torch

WORTH = 1.3  # how much faster another number must be: a quiet machine then never changes, and its figures repeat

ROUNDS = 6  # of trying every number: a scheduler lets a program run for some milliseconds, and then another


class Threads:
    """The number of threads of this process's operations, chosen anew whenever `choose` is called.

    Threads wait for each other at the end of every operation, and one that shares its core with another program comes
    late to each: two cores beside one busy program are four times slower than one. OMP_NUM_THREADS fixes the number.
    """

    def __init__(self, device: torch.device) -> None:
        most = torch.get_num_threads()
        fixed = device.type != "cpu" or "OMP_NUM_THREADS" in os.environ
        self.most, self.counts = most, [most] if fixed else sorted({most, most - 1, most // 2} - {0}, reverse=True)

    def choose(self) -> str | None:
        """Take the number that is fastest now; what to say of it where it is another than before."""
        if len(self.counts) == 1:
            return None
        now = torch.get_num_threads()
        times = dict.fromkeys(self.counts, 0.0)
        for _ in range(ROUNDS):
            for count in self.counts:
                times[count] += seconds(count, self.most)
        best = min(times, key=times.__getitem__)
        if times[best] * WORTH > times.get(now, 0.0):
            best = now
        torch.set_num_threads(best)
        if best == now:
            return None
        why = ", faster now than all (is another program busy?)" if best < self.most else ""
        return f"CPU threads: {best} of {self.most}{why}"


def seconds(threads: int, most: int) -> float:
    """What a row of operations, as large as `most` threads want them, takes with so many: a few milliseconds."""
    torch.set_num_threads(threads)
    x = torch.zeros(most, 2**18)
    start = time.perf_counter()
    for _ in range(40):
        torch.nn.functional.silu(x)
    return time.perf_counter() - start
