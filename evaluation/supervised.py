"""Training on labelled slices: a decoder on frozen features or a whole network, with whatever loss."""

import math
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from engine.config import Config, ConfigError
from engine.files import MetricsLog, checked_number, checked_optimizer, load_checkpoint, save_checkpoint
from engine.process import Process, Tenths, progress, warn
from engine.stopping import StopRequest, leave
from evaluation.batches import Batches
from evaluation.encoder_file import check_same_encoder, sha256_of
from evaluation.results import percent
from losses import seed_of, seeded
from weights import WeightsError, fits


class Stopped(Exception):
    """Asked to stop; everything is saved. Holds the exit code."""


def train(
    cfg: Config,
    process: Process,
    trained: nn.Module,
    batches: Batches,
    augment,
    loss_of,
    validate,
    keep,
    kept,
    stop: StopRequest,
) -> float | None:
    """Train the network; returns the best validation score.

    Args:
        augment: (inputs, targets, step) -> inputs, targets.
        loss_of: (network, inputs, targets) -> scalar; the network is `trained`, compiled or distributed.
        validate: () -> {name: score of the validation cases, 0 to 1, None without any, ...} for the log; the
            first is what models are chosen by.
        keep: () -> None, called when the model is the best so far.
        kept: () -> None, raises ConfigError or WeightsError unless `keep` has left a sound model.

    Raises Stopped.
    """
    folder = Path(cfg.run.out)
    optimizer = make_optimizer(cfg, trained)
    start, best = resume(cfg, process, trained, optimizer, kept)
    log = MetricsLog(folder, process, done=start)
    network = torch.compile(trained) if cfg.run.compile else trained
    if process.world > 1:
        network = DistributedDataParallel(network)

    trained.train()
    losses = []
    steps = range(start, cfg.optim.steps)
    plan = [training_rows(step, len(batches), cfg, process) for step in steps]
    bar = progress(process, f"training ({cfg.mode})", steps, cfg.optim.steps, start)
    tenths = Tenths(cfg.optim.steps, start)
    for step, (inputs, targets) in zip(bar, batches.of(plan)):
        torch.manual_seed(seed_of("dropout", cfg.seed, step, process.rank))
        loss = loss_of(network, *augment(inputs, targets, step))
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * (1 - step / cfg.optim.steps) ** 0.9
        optimizer.zero_grad()
        loss.backward()
        if limit := cfg.optim.get("clip"):
            nn.utils.clip_grad_norm_(trained.parameters(), limit)
        optimizer.step()
        losses.append(loss.detach())

        done, row = step + 1, {}
        last = done == cfg.optim.steps
        if last or done % cfg.log.every == 0:
            row = {"step": done, "loss": mean_loss(losses, done), "lr": optimizer.param_groups[-1]["lr"]}
            losses = []
            text = f"loss {row['loss']:.3f} best {percent(best)}"
            bar.set_postfix_str(text)
            if bar.disable and (line := tenths.line(done, text)):
                process.say(line)
        validating = last or done % cfg.eval.every == 0
        if validating:
            found = validate()
            score = next(iter(found.values()))
            row |= {"step": done, **found}
            trained.train()
        if row:
            log.write(row)
        if validating and (score is None or best is None or score > best):
            best = score
            keep()
        looking = process.world == 1 or done % cfg.log.every == 0  # asking all processes takes time
        stopping = not last and looking and any(process.gather(bool(stop)))
        if process.is_main and not last and (validating or stopping):
            save(cfg, trained, optimizer, done, best)
        if stopping:
            raise Stopped(leave(folder, done, process.gather(stop.reason), process))
    return best


def resume(cfg: Config, process: Process, trained: nn.Module, optimizer, kept) -> tuple[int, float | None]:
    """Load the checkpoint of run.out, if there is one: the steps done, and the best validation score so far.

    Raises ConfigError for one of another program, or of another encoder file.
    """
    folder = Path(cfg.run.out)

    def checked(state: dict) -> dict:
        """Whether `save`, below, can have written it for this evaluation."""
        checked_number(state["step"], 1, cfg.optim.steps - 1)
        if state["best"] is not None:
            checked_number(state["best"], 0, 1, float)
        sha, optimizer_state = state["encoder_sha256"], checked_optimizer(optimizer, state["optimizer"])
        if not fits(state["trained"], trained.state_dict()) or not isinstance(sha, str | None):
            raise ValueError
        check_same_encoder(cfg, sha)
        return state | {"optimizer": optimizer_state}

    state = process.from_main(lambda: load_checkpoint(folder, checked))
    if state is None:
        return 0, None
    if state["best"] is not None:
        try:
            kept()
        except (ConfigError, WeightsError) as error:
            found = f"the best model so far is not usable ({error})"
            raise ConfigError(f"{found}; remove {folder / 'checkpoint.pth'} to start anew") from None
    trained.load_state_dict(state["trained"])
    optimizer.load_state_dict(state["optimizer"])
    process.say(f"resuming from step {state['step']}")
    return state["step"], state["best"]


def save(cfg: Config, trained: nn.Module, optimizer, step: int, best: float | None) -> None:
    state = {"trained": trained.state_dict(), "optimizer": optimizer.state_dict()}
    state |= {"step": step, "best": best, "encoder_sha256": sha256_of(cfg)}
    try:
        save_checkpoint(Path(cfg.run.out), state)
    except OSError as error:
        warn(f"step {step}: no checkpoint written ({error}); training continues")


def make_optimizer(cfg: Config, trained: nn.Module) -> torch.optim.Optimizer:
    """SGD with momentum, or AdamW where the script has an optim.name that says so."""
    groups, decay = parameter_groups(cfg, trained), cfg.optim.weight_decay
    if cfg.optim.get("name") == "adamw":
        return torch.optim.AdamW(groups, weight_decay=decay)
    return torch.optim.SGD(groups, momentum=0.9, weight_decay=decay)


def parameter_groups(cfg: Config, trained: nn.Module) -> list[dict]:
    """The encoder, if it is trained, at its own rate; then everything else that is trained."""
    named = [(name, p) for name, p in trained.named_parameters() if p.requires_grad]
    parameters = [("encoder" in name.split("."), p) for name, p in named]
    encoder = [p for within, p in parameters if within]
    others = [p for within, p in parameters if not within]
    groups = [(encoder, cfg.optim.lr * cfg.optim.encoder_lr_factor), (others, cfg.optim.lr)]
    return [{"params": params, "lr": lr, "initial_lr": lr} for params, lr in groups if params]


def mean_loss(losses: list[Tensor], step: int) -> float:
    """Mean since the last log line (waits for the device); ConfigError if training has diverged."""
    value = float(torch.stack(losses).mean())
    if not math.isfinite(value):
        raise ConfigError(f"optim.lr: the loss is {value} at step {step}; a lower rate may help")
    return value


def training_rows(step: int, count: int, cfg: Config, process: Process) -> list[int]:
    """This process's share of the slices of a step: the global batch depends on (seed, step) only.

    Epochs are permutations of range(count), put end to end and cut into batches.
    """
    size = cfg.optim.batch_size
    share = size // process.world
    first = step * size + process.rank * share
    return [epoch_order(cfg.seed, at // count, count)[at % count] for at in range(first, first + share)]


@lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, count: int) -> list[int]:
    return torch.randperm(count, generator=seeded("epoch", seed, epoch)).tolist()


def training_positions(dataset, fraction: float, seed: int) -> list[int]:
    """The slices of a share of the patients, at least one: the first of a seeded order, so shares nest."""
    everybody = sorted(set(dataset.patients))
    order = torch.randperm(len(everybody), generator=seeded("labels", seed)).tolist()
    chosen = {everybody[i] for i in order[: max(1, round(fraction * len(everybody)))]}
    return [i for i, patient in enumerate(dataset.patients) if patient in chosen]
