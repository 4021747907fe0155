"""What packed attention is to reach beside others, and whether it does; without PyTorch, to be checked anywhere."""

import dataclasses
from typing import Optional

# One image of 16,384 tokens among 1,000 of 64, and 8,192 of 4 to 16: where peers have no kernel that fits.
ONE_LONG, TINY = "one of 16384 among 1000 of 64", "8192 of 4 to 16"
# The length at which the rate of the matrix products is taken.
RATED = "S 4096"


@dataclasses.dataclass
class Row:
    """One pass over one batch."""

    backward: bool
    heads: int
    head_dim: int
    batch: str
    lengths: list
    # Seconds: ours, and those of the peers by name, of those with a deterministic backward pass apart.
    ours: float
    found: dict
    deterministic: dict = dataclasses.field(default_factory=dict)
    # Peers that could not be captured into a graph: launches of theirs wait for the host.
    queued: set = dataclasses.field(default_factory=set)

    @property
    def name(self):
        return f"{'backward' if self.backward else 'forward'} {self.heads}x{self.head_dim} {self.batch}"

    @property
    def tflop(self):
        """Of the matrix products: scores and out, and backward scores, dP, dV, dQ, dK."""
        squares = sum(length * length for length in self.lengths)
        return (10 if self.backward else 4) * squares * self.heads * self.head_dim / 1e12

    @property
    def bytes(self):
        """Read and written once: q, k, v, out and lse, and backward dout and the gradients as well."""
        parts = 8 if self.backward else 4
        return sum(self.lengths) * self.heads * (parts * 2 * self.head_dim + 4)


@dataclasses.dataclass
class Verdict:
    target: str
    reached: str
    # None where it cannot be told.
    met: Optional[bool]

    @property
    def word(self):
        return {True: "met", False: "missed", None: "not judged"}[self.met]


# Peers without which a target is not judged to be met, by the first word of their names.
STRONG = {"cuDNN", "FA3", "FA4"}


def first_word(name):
    return name.split()[0]


def at_least(row, factor):
    """A verdict on how many times as fast as the best peer ours is."""
    target = f">= {factor} x the best peer that ran"
    everyone = {**row.found, **row.deterministic}
    if not everyone:
        return Verdict(target, "no peer ran", None)
    best = min(everyone, key=everyone.get)
    ratio = everyone[best] / row.ours
    # Beside the weakest alone nothing is reached.
    met = ratio >= factor if STRONG & set(map(first_word, everyone)) or ratio < factor else None
    return Verdict(target, f"{ratio:.2f} x {best}", met)


def long_backward(row):
    target = ">= 0.95 x the best peer that ran, >= 1.0 x the best deterministic one"
    reached, met = [], []
    for found, factor in ((row.found, 0.95), (row.deterministic, 1.0)):
        if not found:
            reached.append("none ran")
            continue
        best = min(found, key=found.get)
        ratio = found[best] / row.ours
        reached.append(f"{ratio:.2f} x {best}")
        met.append(ratio >= factor)
    # One that is missed is missed, whatever the other would have been.
    verdict = False if False in met else True if len(met) == 2 else None
    return Verdict(target, "; ".join(reached), verdict)


def of_rates(row, rates, bandwidth):
    """A verdict on the time beside what operations or bytes take, whichever is more."""
    target = "<= 1.3 x what operations and bytes take"
    rate = rates.get((row.backward, row.head_dim))
    if rate is None or not bandwidth:
        return Verdict(target, "no rate was measured", None)
    needed = max(row.tflop / rate, row.bytes / bandwidth)
    ratio = row.ours / needed
    return Verdict(target, f"{ratio:.2f} x {needed * 1e6:.0f} us", ratio <= 1.3)


def verdict(row, rates, bandwidth):
    """The verdict on a row. `rates` holds our TFLOP/s at RATED by (backward, head dim), `bandwidth` bytes a second."""
    longest = max(row.lengths)
    if row.batch in (ONE_LONG, TINY):
        return of_rates(row, rates, bandwidth)
    if longest >= 2048 and min(row.lengths) == longest:
        return long_backward(row) if row.backward else at_least(row, 1.0)
    if row.head_dim == 64 and (longest <= 256 or min(row.lengths) != longest):
        return at_least(row, 2.0)
    return at_least(row, 1.2)


def judged(rows, bandwidth):
    """(row, verdict) of each."""
    rates = {(row.backward, row.head_dim): row.tflop / row.ours for row in rows if row.batch == RATED}
    return [(row, verdict(row, rates, bandwidth)) for row in rows]


def page(rows, bandwidth, same_bits):
    """The Markdown of the rows so far; `same_bits` is the verdict on determinism, or None before it is known."""
    peers = list(dict.fromkeys(peer for row in rows for peer in (*row.found, *row.deterministic)))
    lines = [
        "## Packed attention",
        "",
        "TFLOP/s of the matrix products, 4 S² Dh of every image and head forward and 10 backward. A row is heads x "
        "head dim and a batch: S 64 is 32768 tokens in images of 64, r~U(64,256) NaViT's images of sides from 64 to "
        "256 pixels at patch 16. Ours includes RMS norm of q and k, forward and backward, which the peers leave out, "
        "and is meant to have the same bits in every run; of the peers' backward passes only those called "
        "deterministic are. * is not a graph but queued by the host, which may be what is measured.",
        "",
        "| | ours | " + " | ".join(peers) + " |",
        "|---|" + "---:|" * (len(peers) + 1),
    ]
    for row in rows:
        found = {**row.found, **row.deterministic}
        rates = {peer: f"{row.tflop / time:.0f}{'*' if peer in row.queued else ''}" for peer, time in found.items()}
        cells = [rates.get(peer, "") for peer in peers]
        lines.append(f"| {row.name} | {row.tflop / row.ours:.0f} | " + " | ".join(cells) + " |")
    verdicts = judged(rows, bandwidth)
    everything = [verdict for _, verdict in verdicts] + ([same_bits] if same_bits else [])
    count = {word: sum(verdict.word == word for verdict in everything) for word in ("met", "missed", "not judged")}
    lines += [
        "",
        "## Targets",
        "",
        "What this project set itself, and whether this run reached it: "
        + ", ".join(f"{number} {word}" for word, number in count.items())
        + ". A ratio is the time of the peer over ours, both of this process. The batches of tiny images, and of a "
        "long one among small ones, are held against the time that their operations take at our own rate at S 4096 in "
        f"this run, or their bytes at that of a copy ({bandwidth / 1e9:.0f} GB/s here), whichever is more.",
        "",
        "| | target | reached | |",
        "|---|---|---|---|",
    ]
    lines += [f"| {row.name} | {v.target} | {v.reached} | {v.word} |" for row, v in verdicts]
    if same_bits:
        lines.append(f"| determinism | {same_bits.target} | {same_bits.reached} | {same_bits.word} |")
    return "\n".join(lines) + "\n"


SAME_BITS = "the same bits over 100 runs and over two processes"


def determinism(children):
    """The verdict on what two processes printed, {"runs": number, "same": bool, "hash": text}; None for one that
    failed."""
    if len(children) < 2 or None in children:
        return Verdict(SAME_BITS, "a process did not end well", None)
    if not all(child["same"] for child in children):
        return Verdict(SAME_BITS, "runs of one process differ", False)
    if len({child["hash"] for child in children}) > 1:
        return Verdict(SAME_BITS, "processes differ", False)
    return Verdict(SAME_BITS, f"{children[0]['runs']} runs, {len(children)} processes", True)


def self_check():
    """Verdicts on made-up times. Returns how many; raises AssertionError."""

    def row(batch, lengths, ours, found, backward=False, head_dim=64, deterministic=None):
        return Row(backward, 16, head_dim, batch, lengths, ours, found, deterministic or {})

    peers = {"torch": 3.0, "cuDNN": 2.4}
    rated = row(RATED, [4096] * 8, 1.0, peers)
    cases = [
        (row("S 64", [64] * 512, 1.2, peers), True, "2.00 x cuDNN"),
        (row("S 64", [64] * 512, 1.3, peers), False, "1.85 x cuDNN"),
        (row("r~U(64,512)", [9, 700], 1.3, peers), False, "1.85 x cuDNN"),
        (row("r~U(64,512)", [9, 700], 1.9, peers, head_dim=80), True, "1.26 x cuDNN"),
        (row("S 64", [64] * 512, 2.1, peers, head_dim=128), False, "1.14 x cuDNN"),
        (row("S 577", [577] * 56, 2.0, peers, True), True, "1.20 x cuDNN"),
        (row("S 1024", [1024] * 32, 2.5, peers), False, "0.96 x cuDNN"),
        (row("S 2048", [2048] * 16, 2.4, peers), True, "1.00 x cuDNN"),
        (row("S 2048", [2048] * 16, 2.5, peers), False, "0.96 x cuDNN"),
        (row("S 2048", [2048] * 16, 2.5, peers, True, 64, {"C": 2.5}), True, "0.96 x cuDNN; 1.00 x C"),
        (row("S 2048", [2048] * 16, 2.5, peers, True, 64, {"C": 2.4}), False, "0.96 x cuDNN; 0.96 x C"),
        (row("S 2048", [2048] * 16, 2.5, peers, True), None, "0.96 x cuDNN; none ran"),
        (row("S 2048", [2048] * 16, 3.0, peers, True), False, "0.80 x cuDNN; none ran"),
        (row("S 64", [64] * 512, 1.2, {}), None, "no peer ran"),
        (row("S 64", [64] * 512, 1.2, {"torch": 3.0}), None, "2.50 x torch"),
        # As many operations as at 4096, and no time for bytes to speak of: a second.
        (row(ONE_LONG, [4096] * 8, 1.25, {}), True, "1.25 x 1000000 us"),
        (row(ONE_LONG, [4096] * 8, 1.35, {}), False, "1.35 x 1000000 us"),
        (row(ONE_LONG, [4096] * 8, 1.35, {}, True), None, "no rate was measured"),
        # 10 tokens of 16 heads of 516 bytes, and twice that and 4 less backward, at 1 GB/s.
        (row(TINY, [4, 6], 100e-6, {}), True, "1.21 x 83 us"),
    ]
    bandwidth = 1e9
    everything = judged([rated, *(case[0] for case in cases)], bandwidth)[1:]
    # The copy is fast where operations count.
    fast = judged([rated, *(case[0] for case in cases)], 1e15)[1:]
    for (made, met, reached), slow, quick in zip(cases, everything, fast):
        found = (slow if made.batch == TINY else quick)[1]
        assert (found.met, found.reached) == (met, reached), f"{made.name}: {found}, expected {met} and {reached}"
    good = {"runs": 100, "same": True, "hash": "x"}
    for children, met in (
        ([good, good], True), ([good], None), ([good, None], None), ([good, {**good, "hash": "y"}], False),
        ([good, {**good, "same": False}], False),
    ):
        assert determinism(children).met is met, children
    text = page([rated, cases[0][0]], 4e12, determinism([good, good]))
    assert "2 met, 0 missed" not in text and "3 met, 0 missed, 0 not judged" in text, text
    assert "| forward 16x64 S 64 | >= 2.0 x the best peer that ran | 2.00 x cuDNN | met |" in text, text
    assert text.count("\n| forward 16x64 S 4096 |") == 2 and "| determinism | the same bits" in text, text
    return len(cases)
