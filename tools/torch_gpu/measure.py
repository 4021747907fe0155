"""How both sides are compared and timed."""

import math
import statistics
import subprocess

CACHES = 3  # operands together are so many times the L2 cache
REPLAYS = 20
REPLAY_SECONDS = 20e-3  # of a replay at most, where that is more than a pass over the operands


def distance(x, y):
    x, y = x.double(), y.double()
    return float(1 - 2 * (x * y).sum() / ((x * x).sum() + (y * y).sum()))


def check(what, ours, wanted, limit):
    found = distance(ours, wanted)
    if not found <= limit:
        raise RuntimeError(f"{what}: distance {found:.2e} from the reference, expected at most {limit:.0e}")


def sets_for(torch, bytes_of_set):
    properties = torch.cuda.get_device_properties(0)
    wanted = CACHES * properties.L2_cache_size // bytes_of_set + 2
    return max(2, min(wanted, properties.total_memory // 4 // bytes_of_set))


def seconds(torch, run, sets, capture=True, stream=None):
    """Median seconds of run(set), 16 runs at a time, or as many passes over the sets as last REPLAY_SECONDS where that
    is less: as a graph, or queued as they are. `stream` is where they run; gradients want that of their forward pass.
    """
    stream = stream or torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())

    def once():
        for i in range(sets):
            run(i)

    def between(queue):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        queue()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    with torch.cuda.stream(stream):
        once()
        stream.synchronize()
        passes = max(1, min(-(-16 // sets), math.ceil(REPLAY_SECONDS / between(once))))

        def queue():
            for _ in range(passes):
                once()

        replay = queue
        if capture:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                queue()
            replay = graph.replay
        times = [between(replay) / (sets * passes) for _ in range(REPLAYS + 3)]
    return statistics.median(times[3:])


def stream_of(torch):
    return torch.cuda.current_stream().cuda_stream


def table(title, rows):
    lines = [f"## {title}", ""]
    peers = list(dict.fromkeys(peer for _, _, found in rows for peer in found))
    lines += [
        "| | ours | " + " | ".join(peers) + " | ours / best |",
        "|---|" + "---:|" * (len(peers) + 2),
    ]
    for name, ours, found in rows:
        cells = [f"{found[peer]:.0f}" if peer in found else "" for peer in peers]
        ratio = f"{ours / max(found.values()):.2f}" if found else ""
        lines.append(f"| {name} | {ours:.0f} | " + " | ".join(cells) + f" | {ratio} |")
    return "\n".join(lines) + "\n"


def driver_and_clocks():
    fields = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit"
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "-i", "0"],
            capture_output=True, text=True, check=True,
        )
        return f"{fields}: {done.stdout.strip()}"
    except (OSError, subprocess.CalledProcessError):
        return "driver and clocks unknown: no nvidia-smi"
