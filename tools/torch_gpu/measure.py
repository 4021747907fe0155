"""How both sides are compared and timed."""

import statistics
import subprocess

CACHES = 3  # operands together are so many times the L2 cache
REPLAYS = 20


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


def seconds(torch, run, sets, capture=True):
    """Median seconds of run(set). One pass over the sets, or more, is a graph; autograd, which goes back to the
    stream of its forward pass, is queued as is."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for i in range(sets):
            run(i)
    torch.cuda.synchronize()
    passes = -(-16 // sets)

    def queue():
        for _ in range(passes):
            for i in range(sets):
                run(i)

    replay = queue
    if capture:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            queue()
        replay = graph.replay
    times = []
    for _ in range(REPLAYS + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / (sets * passes))
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
