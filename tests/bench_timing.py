"""Times of things side by side, and what they were measured on, for bench.py."""

import os
import platform
import time
from collections import defaultdict
from pathlib import Path
from statistics import median

import torch
import torchvision

WARM_UP = 2  # rounds that do not count


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def interleaved(actions: dict, rounds: int, busy: bool = False) -> dict[str, list[float]]:
    """Seconds of each action, round by round: what slows the machine down slows all of them down.

    busy: two values of `undisturbed` each, with one thread.
    """
    if busy:
        torch.set_num_threads(1)
        for action in [action for action in actions.values() for _ in range(WARM_UP)]:
            action()
        halves = [{name: undisturbed(own, -(-rounds // 2)) for name, own in actions.items()} for _ in "12"]
        return {name: [half[name] for half in halves] for name in actions}
    times = {name: [] for name in actions}
    for round_ in range(rounds + WARM_UP):
        for name, action in actions.items():
            synchronise()
            start = time.perf_counter()
            action()
            synchronise()
            if round_ >= WARM_UP:
                times[name].append(time.perf_counter() - start)
    return times


def undisturbed(action, rounds: int) -> float:
    """Seconds of an action on a CPU that keeps being taken away: the sum over its operations, each at the
    lower quartile of how long it took with these shapes. What Python does between them is left out.

    A step of a second is never left alone on such a machine, an operation of some milliseconds often is.
    """
    with torch.profiler.profile(record_shapes=True) as profile:
        for _ in range(rounds):
            action()
    found = defaultdict(list)
    for event in profile.events():
        found[event.name, str(event.input_shapes)].append(event.self_cpu_time_total)  # microseconds
    return sum(len(own) * sorted(own)[len(own) // 4] for own in found.values()) / rounds / 1e6


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def over(times: dict[str, list[float]], base: str) -> dict:
    """The times over those of `base`, round by round: medians and quartiles; and milliseconds. For what takes
    milliseconds the fastest rounds say more on a busy machine."""
    ratios = {name: [a / b for a, b in zip(own, times[base])] for name, own in times.items()}
    return {
        "ratios": {name: round(median(own), 4) for name, own in ratios.items()},
        "quartiles": {name: quartiles(own) for name, own in ratios.items()},
        "milliseconds": {name: round(1000 * median(own), 2) for name, own in times.items()},
        "fastest_milliseconds": {name: round(1000 * min(own), 3) for name, own in times.items()},
    }


def quartiles(values: list[float]) -> list[float]:
    return [round(sorted(values)[(len(values) - 1) * q // 4], 4) for q in (1, 3)]


def machine() -> dict:
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def cpu_name() -> str:
    """The model; where that says little, with the widest instructions for matrices."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = dict(reversed([line.replace("\t", "").split(": ", 1) for line in lines if ": " in line]))
    units = [unit for unit in ("amx_bf16", "avx512f", "avx2") if unit in facts.get("flags", "").split()]
    return f"{facts.get('model name', platform.machine())} ({units[0] if units else 'no avx2'})"
