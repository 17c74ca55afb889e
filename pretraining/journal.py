"""What a pretraining run says of itself: metrics.jsonl and the progress bar."""

import math
import time
from pathlib import Path

from collapse import label_free_score, recent_similarity
from engine.config import Config
from engine.files import MetricsLog
from engine.process import Process, Tenths, progress
from pretraining.guard import losses_of, terms_text
from pretraining.monitor import describe_collapse
from pretraining.schedule import learning_rate


class Journal:
    """metrics.jsonl, and the progress bar, or a line for every tenth where there is no terminal."""

    def __init__(self, cfg: Config, process: Process, steps_per_epoch: int, total_steps: int, step: int):
        self.cfg, self.process, self.steps_per_epoch = cfg, process, steps_per_epoch
        self.total_steps = total_steps
        self.log = MetricsLog(Path(cfg.run.out), process, step, cfg.log.tensorboard)
        self.bar = progress(process, "pretrain", total=total_steps, initial=step)
        self.tenths = Tenths(total_steps, step)
        self.since, self.clock = step, time.perf_counter()
        self.rank_text, self.unreadable, self.warned = "", 0, False
        self.bad = {}  # {step: its terms} of the bad steps in a row
        self.latest = {}  # the newest value of every column
        self.similarities = []  # the cosine of keys of every log line
        self.best = -math.inf  # the highest label-free score so far
        for row in self.log.before if process.is_main else []:
            self.remember(row)

    def note(self, step: int, found: dict[str, float]) -> dict[str, float]:
        """Take in what is known of a step; returns it."""
        self.bar.update()
        self.unreadable += int(found["unreadable"])
        self.bad = self.bad | {step: found} if found["bad_in_row"] else {}
        if self.bad:
            self.process.say(f"step {step}: {terms_text(found)}: not finite, skipped")
        if step % self.cfg.log.every == 0 or step == self.total_steps:
            now = time.perf_counter()
            rate = (step - self.since) * self.cfg.optim.batch_size / (now - self.clock)
            self.since, self.clock = step, now
            row = {"step": step, "epoch": self.epoch(step)}
            row |= losses_of(found) | {"gradient_norm": found["gradient_norm"]}
            row["lr"] = learning_rate(step - 1, self.steps_per_epoch, self.total_steps, self.cfg.optim)
            row |= {"images_per_second": round(rate, 1), "skipped_steps": int(found["skipped_steps"])}
            self.write(row | {"unreadable_slices": self.unreadable})
            self.say(step, f"{loss_text(found)}{self.rank_text} {rate:.0f} images/s")
            if not self.warned and found.get("similarity", 0) > ONE_POINT and self.warmed_up(step):
                self.warned = True
                self.process.say(f"step {step}: {one_point_text(found, bool(self.cfg.model.queue_size))}")
        return found

    def warmed_up(self, step: int) -> bool:
        return self.epoch(step) > self.cfg.optim.warmup_epochs and self.cfg.model.weight != 0

    def say(self, step: int, text: str) -> None:
        self.bar.set_postfix_str(text)
        if self.bar.disable and (line := self.tenths.line(step, text)):
            self.process.say(line)

    def knows_collapse(self, step: int) -> bool:
        """Whether it was measured before the run was stopped."""
        return any(row["step"] == step and "effective_rank" in row for row in self.log.before)

    def collapse(self, step: int, measured: dict) -> None:
        """Take in what CollapseMonitor has measured (nothing, on all processes but the main one)."""
        if measured:
            self.write({"step": step, "epoch": self.epoch(step), **measured})
            self.process.say(f"step {step}: {describe_collapse(measured)}")
            self.rank_text = f" rank {measured['effective_rank']:.1f}"
        self.since, self.clock = step, time.perf_counter()

    def write(self, row: dict) -> None:
        self.log.write(row)
        self.remember(row)

    def remember(self, row: dict) -> None:
        self.latest |= row
        if "loss" in row:  # without projections to compare, or a loss of them, they say nothing
            self.similarities.append(row.get("similarity", 0.0) if self.cfg.model.weight != 0 else 0.0)
        if (score := row.get("score")) is not None:
            self.best = max(self.best, score)

    def scored(self, step: int, measured: dict) -> dict:
        """What CollapseMonitor has measured, with the label-free score; the untrained encoder has none."""
        if not measured or not step:
            return measured
        score = label_free_score(measured["grey_readout"], recent_similarity(self.similarities))
        return measured if math.isnan(score) else measured | {"score": round(score, 5)}

    def names_to_keep(self, step: int, measured: dict) -> list[str]:
        """The names under which the encoder just measured is kept: encoder_STEP if log.encoders, encoder_best
        if its label-free score is above all earlier ones."""
        if not measured:
            return []
        names = [f"encoder_{step}"] if self.cfg.log.encoders else []
        return names + ["encoder_best"] if measured.get("score", -math.inf) > self.best else names

    def epoch(self, step: int) -> float:
        return round(step / self.steps_per_epoch, 4)

    def close(self) -> None:
        self.bar.close()
        self.log.close()


ONE_POINT = 0.99  # mean cosine of the keys of different images; networks start at some 0.996


def loss_text(found: dict) -> str:
    return f"loss {found['loss']:.3f}" + (f" local {found['local']:.3f}" if found["local"] else "")


def one_point_text(found: dict, has_queue: bool) -> str:
    what = "keys" if has_queue else "projections"
    start = (
        f"the {what} of different images have a mean cosine of {found['similarity']:.4f}: all images are one "
    )
    if not has_queue:
        return start + "point; a lower optim.lr, or decorrelation at output, can help"
    return start + (
        "point, and the global loss only tells new keys from old ones; a shorter model.queue_size, a "
        "model.momentum nearer to 1, or decorrelation at output can help"
    )
