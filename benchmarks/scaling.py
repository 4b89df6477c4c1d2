"""Time and cost of pre-training `base` on 1, 8 and 64 GPUs, from what was measured on one.

    python benchmarks/scaling.py                              # writes the tables of docs/scaling.md
    python benchmarks/scaling.py --price_per_gpu_hour 2.5     # and the cost, in the unit of the price

The speed of one GPU comes from the result of `gpu_step.py`. Where a batch was not measured, a larger one gives a
bound, since fewer clouds take no longer; where there is none, the table says so. The exchange of gradients between
GPUs is computed from data sheets, as if none of it overlapped with the backward pass.
"""

import argparse
import json
from pathlib import Path

from jointmae_hf import JointMAEConfig, JointMAEForPreTraining
from jointmae_hf.training.flops import PEAKS, training_flops


ROOT = Path(__file__).resolve().parent.parent
MEASURED = ROOT / "benchmarks" / "results" / "gpu_step.json"
DOCUMENT = ROOT / "docs" / "scaling.md"
SAMPLES = 12_600_000  # 300 epochs of ShapeNet-55's training shapes, as the relatives train
# GPUs, clouds of each in a step, and how it is launched: only one GPU can replay a graph.
LAYOUTS = ((1, 512, ", CUDA graph"), (8, 512, ""), (64, 128, ""))
LARGER_BATCH = 512
# Bytes per second of a GPU, one way, by data sheets: NVLink 4 within a machine of 8, 400 Gb/s InfiniBand between them.
LINKS = {8: 450e9, 64: 50e9}
UNKNOWN = "not measured"


def exchange_seconds(num_gpus: int, num_parameters: int) -> float:
    """Of a ring that sums float32 gradients: each GPU sends and receives nearly two times all of them."""
    return 0.0 if num_gpus == 1 else 2 * (num_gpus - 1) / num_gpus * 4 * num_parameters / LINKS[num_gpus]


def sizes_table() -> str:
    lines = [
        "| size | points | parameters, M | GFLOP a sample | samples/s at the peak of an H100 |",
        "|---|--:|--:|--:|--:|",
    ]
    for preset in ("tiny", "small", "base"):
        config = JointMAEConfig.from_preset(preset)
        flops = training_flops(config)
        lines.append(
            f"| {preset} | {config.num_points:,} | {num_parameters(config) / 1e6:.1f} | {flops / 1e9:.2f} "
            f"| {PEAKS['H100'] / flops:,.0f} |"
        )
    return "\n".join(lines)


def estimate_table(sections: dict, price: float | None) -> str:
    """One row for each of `LAYOUTS`; `sections` are those of `gpu_step.py`, which may lack any."""
    parameters = num_parameters(JointMAEConfig.from_preset("base"))
    columns = ["GPUs", "samples of a step", "steps", "step of one alone, ms", "exchange of gradients, ms"]
    columns += ["samples/s of all", "minutes", "GPU-hours", *([] if price is None else ["cost"])]
    lines = [f"| {' | '.join(columns)} |", "|--:" * len(columns) + "|"]
    for num_gpus, batch_size, launch in LAYOUTS:
        measured, bound = sections.get(f"training, batch {batch_size}{launch}", {}), ""
        if "step_seconds" not in measured:
            measured, bound = sections.get(f"training, batch {LARGER_BATCH}{launch}", {}), "at most "
        exchange = exchange_seconds(num_gpus, parameters)
        row = [num_gpus, f"{num_gpus * batch_size:,}", f"{SAMPLES / (num_gpus * batch_size):,.0f}"]
        if "step_seconds" not in measured:
            row += [UNKNOWN, f"{1e3 * exchange:.2f}", *[""] * (len(columns) - 5)]
        else:
            seconds = measured["step_seconds"]["median"]
            rate = num_gpus * batch_size / (seconds + exchange)
            hours = SAMPLES / rate / 3600
            row += [
                f"{bound}{1e3 * seconds:.1f}",
                f"{1e3 * exchange:.2f}",
                f"{bound.replace('most', 'least')}{rate:,.0f}",
                f"{bound}{60 * hours:.1f}",
                f"{bound}{num_gpus * hours:.2f}",
            ]
            row += [] if price is None else [f"{bound}{price * num_gpus * hours:,.2f}"]
        lines.append("| " + " | ".join(map(str, row)) + " |")
    return "\n".join(lines)


def num_parameters(config: JointMAEConfig) -> int:
    return JointMAEForPreTraining(config).num_parameters()


def replace_part(text: str, name: str, part: str) -> str:
    """Puts a table between the two comments that bear its name."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, _, rest = text.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"{DOCUMENT} has no part {name!r}.")
    return f"{before}{begin}\n{part}\n{end}{after}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--price_per_gpu_hour", type=float)
    arguments = parser.parse_args()
    measured = json.loads(MEASURED.read_text()) if MEASURED.exists() else {"sections": {}}
    text = replace_part(DOCUMENT.read_text(), "sizes", sizes_table())
    text = replace_part(text, "estimate", estimate_table(measured["sections"], arguments.price_per_gpu_hour))
    DOCUMENT.write_text(text)


if __name__ == "__main__":
    main()
