"""The result of a run in a few lines."""

from typing import Any


def summarize(result: dict[str, Any]) -> str:
    """
    A Markdown table of what a run reached, and a line on its speed.

    Args:
        result: what [`pretrain`] returns.
    """
    samples = result["steps"] * result["arguments"]["batch_size"]
    share = "" if result["share_of_peak"] is None else f", {result['share_of_peak']:.1%} of the peak"
    lines = [
        f"{samples:,} samples in {result['seconds'] / 60:.1f} minutes on {result['num_processes']} x "
        f"{result['device']}: {result['samples_per_second']:,.0f} samples/s, "
        f"{result['flops_per_second'] / 1e12:.3g} TFLOP/s{share}.",
    ]
    report = result["report"] or {}
    rows = []
    if "reconstruction" in report:
        held_out, averaged = (report["reconstruction"][name] for name in ("held_out", "encoder_output_averaged"))
        for name, title in (("loss_3d", "3D loss, 1e-3"), ("loss_2d", "2D loss, 1e-3")):
            if name in held_out:
                rows.append((title, 1e3 * held_out[name], 1e3 * averaged[name], "the encoder's output averaged"))
    if "linear_svm" in report:
        svm = report["linear_svm"]
        trained, untrained = svm["pretrained"]["accuracy"], svm["untrained"]["accuracy"]
        rows.append((f"linear SVM, {svm['classes']} classes, %", trained, untrained, "the same network untrained"))
    if rows:
        lines += ["", "| held out | trained | compared with | |", "|---|--:|--:|---|"]
        lines += [f"| {title} | {value:.2f} | {other:.2f} | {what} |" for title, value, other, what in rows]
    return "\n".join(lines)
