"""The model card beside an encoder: what its JSON file says, for whoever is handed the weights."""

AXES = {0: "sagittal", 1: "coronal", 2: "axial", None: "axis unknown"}
MEASURES = {  # of metrics.jsonl
    "score": "label-free score (docs/TRAINING.md)",
    "grey_readout": "grey values read off dense features, R^2",
    "similarity": "mean cosine of the keys or projections of different slices",
    "effective_rank": "effective rank of pooled features",
    "effective_rank_dense": "effective rank of dense features",
    "loss": "loss",
}


def model_card(name: str, card: dict) -> str:
    """Markdown; `card` is what run_state.export writes into NAME.json."""
    config, data, arch = card["config"], card["data"], card["arch"]
    optim, views, local, whitening = (config[key] for key in ("optim", "augment", "local", "decorrelation"))
    training = {
        "method": config["method"],
        "steps": f"{card['steps']:,} of {optim['batch_size']} slices",
        "views": f"{config['data']['size']} px, of {views['scale'][0]:g} to {views['scale'][1]:g} of a slice",
        "local features": f"weight {local['weight']:g}, {local['match']}" if local["weight"] else "none",
        "decorrelation": whitening["method"],
        "optimiser": f"{optim['name']}, rate {optim['lr']:g}, weight decay {optim['weight_decay']:g}",
        "first weights, seed": f"{config['model']['init']}, {config['seed']}",
        "versions": ", ".join(f"{package} {version}" for package, version in card["versions"].items()),
    }
    slices = {
        "slices, cases": f"{data['slices']:,}, {data['cases']:,}",
        "source": data["source"] or "unknown",
        "values": data["kind"] or "unknown",
        "axis": AXES[data["axis"]],
        "size": " x ".join(map(str, data["size"])) + " px" if data["size"] else "several",
        "pixels": pixels(data["pixel_mm"]),
        "channels": "the slice and its two neighbours" if data["neighbours"] else "the slice",
    }
    measured = {
        text: f"{value:.4g}"
        for key, text in MEASURES.items()
        if (value := card["metrics"].get(key)) is not None
    }
    return f"""\
# {name}: a {arch} for CT slices

`{name}.pth` holds the weights of a {arch} under torchvision's names, without `fc`. They were pretrained
without labels, with med-moco.
`{name}.json` has every setting. SHA-256: {card["sha256"]}

- Input, in {card["in_channels"]} channel(s): {network_input(card["normalisation"])}
- For research: to start from when a network is trained on one's own labels, or frozen under a small head.
  It is no medical device. How it does on patients, scanners and parts of the body that are not among those
  it has seen is unknown.

{rows("learnt from", slices)}

{rows("training", training)}

{rows("measured without labels", measured)}
"""


def network_input(normalisation: dict) -> str:
    window, mean, std = (normalisation[key] for key in ("window", "mean", "std"))
    value = f"clip(value, {window[0]:g}, {window[1]:g}) scaled to [0, 1]" if window else "value"
    return f"({value} - {mean:g}) / {std:g}"


def pixels(mm: tuple | None) -> str:
    """mm: ((least, most), (least, most)) of rows and columns."""
    if not mm:
        return "of unknown size"
    return (
        " x ".join(f"{least:g}" if least == most else f"{least:g} to {most:g}" for least, most in mm) + " mm"
    )


def rows(title: str, values: dict[str, str]) -> str:
    return "\n".join(
        [f"| {title} | |", "|---|---|", *(f"| {key} | {value} |" for key, value in values.items())]
    )
