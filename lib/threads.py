"""Threads: whether other processes hold the cores that this one wants."""
import os
import time

import torch


def _busy_time(cores):
    """{core: seconds/100 at work since the system started}; {} where nobody says."""
    try:
        with open("/proc/stat") as file:
            lines = [line.split() for line in file if line.startswith("cpu") and line[3].isdigit()]
    except OSError:
        return {}
    times = {int(name[3:]): [int(x) for x in numbers] for name, *numbers in lines}
    # user, nice, system, idle, iowait, irq, softirq, steal
    return {core: sum(x[:3]) + sum(x[5:8]) for core, x in times.items() if core in cores}


def used_by_others(seconds=0.2):
    """How many of the cores that this process may run on are at work while it sleeps."""
    if not hasattr(os, "sched_getaffinity"):  # neither macOS nor Windows
        return 0.0
    cores = os.sched_getaffinity(0)
    before = _busy_time(cores)
    time.sleep(seconds)
    return sum(now - before[core] for core, now in _busy_time(cores).items()) / (100 * seconds)


def warn_if_busy(device):
    """Print what to do when the threads would have to wait for one another: seven times slower was measured
    for two processes of two threads each on two cores."""
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads < 2:
        return
    used = used_by_others()
    there = len(os.sched_getaffinity(0)) if used else threads
    if threads > there - used + 0.5:
        print(f"note: other processes hold {used:.1f} of {there} cores, and {threads} threads then wait "
              "for one another; start it with OMP_NUM_THREADS=1, or alone")
