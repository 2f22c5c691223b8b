"""`train`: contrastive pretraining, from images to an encoder, in one readable loop."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ssl_fast._checks import with_plain_numbers
from ssl_fast._distributed import Team, everyone, gather
from ssl_fast.accelerate import accelerate as accelerated
from ssl_fast.arguments import check_arguments, check_warmup, defaults
from ssl_fast.augment import Policy, TwoViews, policy_named, seed_of
from ssl_fast.backbones import SMALL_IMAGE, build_encoder
from ssl_fast.cached import CachedStep
from ssl_fast.cached import checkpoint_stages as checkpointed
from ssl_fast.data import ImageData, Loader, epoch_batches, load_data
from ssl_fast.evaluate import embedding_std, knn_on
from ssl_fast.features import encode, folded
from ssl_fast.methods import METHODS, Method
from ssl_fast.online import OnlineProbe
from ssl_fast.ops.two_views import PackedImages
from ssl_fast.optim import SCHEDULES, build_optimizer
from ssl_fast.plots import plot_views
from ssl_fast.progress import Interruption, Progress, Stopwatch
from ssl_fast.report import describe
from ssl_fast.report import draw as draw_pictures
from ssl_fast.report import write as write_report
from ssl_fast.run import Run, pick_device, read_rows, rng_state, seed_everything, set_rng_state
from ssl_fast.sync_batch_norm import convert_sync_batchnorm

log = logging.getLogger("ssl_fast")


@with_plain_numbers
def train(
    out: str | Path,
    data: str | Path = "digits",
    method: str = "simclr",
    model: str | nn.Module = "resnet18",
    *,
    epochs: int = 100,
    batch_size: int = 256,
    data_dir: str | Path | None = None,
    image_size: int | None = None,
    augment: str | Policy = "auto",
    stem: str = "auto",
    optimizer: str = "auto",
    lr: float | None = None,
    weight_decay: float | None = None,
    schedule: str = "auto",
    warmup_epochs: float | None = None,
    precision: str = "fp32",
    accelerate: bool = False,
    micro_batch: int | str | None = None,
    memory: str | None = None,
    checkpoint_stages: bool = False,
    device: str = "auto",
    num_workers: int | None = None,
    seed: int = 0,
    knn_every: int = 1,
    probe_every: int = 1,
    log_every: int = 10,
    save_every: int = 0,
    keep_every: int = 0,
    resume: bool | Literal["auto"] = False,
    overwrite: bool = False,
    **method_args: Any,
) -> dict[str, Any]:
    """Train an encoder without labels; everything of the run is written to the folder `out`.

    A run is a function of its arguments: an interrupted one continues with the same arguments and resume=True, and
    ends with the weights and metrics of an unbroken one (to the bit on a CPU with as many threads; on a GPU as far as
    its convolutions are deterministic). The order of the data depends on (seed, epoch), and a view on (seed, epoch,
    image) alone, however many processes share the batch.

    Started by torchrun, the processes share each batch, and the loss is that of all of it; batch norm sees all of it
    too, but in MoCo, whose method wants it apart. The first process alone writes.

    Args:
        out: folder for args.yaml, metrics.jsonl, train.log, TensorBoard events, checkpoints/, plots/ and
            report.html, which shows it all.
        data: "digits", "fashion_mnist", "cifar10", "stl10", or the path of a folder of images. Those whose shorter side
            is 16/7 of `image_size` or more are averaged over whole pixels to below that, or decoded so, before the
            crop, which keeps a batch of large photographs small; ImageNet's, of 375 pixels or so, stay as they are.
        method: "simclr", "barlow_twins", "moco_v1" or "moco_v2"; each with the optimizer, schedule and augmentation of
            its paper where they are "auto".
        model: "convnet", a torchvision or timm name, or an nn.Module from images to (N, features).
        epochs: passes over the images; the last, incomplete batch of a pass is left out.
        batch_size: images a step, on all processes together; each gives two views.
        data_dir: where the files of a named data set are, or are downloaded to.
        image_size: pixels of a view's side; default the images' own, 224 for folders.
        augment: "simclr", "simclr_small" (no blur, s = 0.5), "moco_v1", "moco_v2" (with blur), "barlow_twins" (another
            for the second view), "barlow_twins_small", "digits" (no flip), "digits_blur", "barlow_twins_digits", a
            ssl_fast.augment.Policy, or "auto" by method, data set and image size.
        stem: "small" (3x3, for ResNets), "imagenet" (7x7), or "auto": small up to 64 pixels.
        optimizer: "lars" (simclr, barlow_twins), "sgd" (moco) or "adamw".
        lr: peak learning rate; default 0.3 (lars; 0.2 for barlow_twins, whose biases learn at 0.024 of it), 0.03 (sgd)
            or 5e-4 (adamw) times batch_size / 256.
        weight_decay: default 1e-6 (barlow_twins 1.5e-6), 1e-4 or 0.05; never on biases and normalisation.
        schedule: "cosine" (simclr, moco_v2), "cosine_0.001" (barlow_twins), which ends at a thousandth of lr, or "step"
            (moco_v1): x 0.1 at 60% and at 80% of the epochs.
        warmup_epochs: of linear warm-up before; default a tenth of the epochs, at most 10; 0 for moco.
        precision: "fp32", or "bf16" for autocast (the loss is fp32 in any case).
        accelerate: put ssl_fast's fused norms into the encoder and the head, as `ssl_fast.accelerate` does; checkpoints
            have the same keys.
        micro_batch: images of a view that the encoder holds activations of at once, while the loss sees the whole batch
            (`ssl_fast.CachedStep`): a second forward pass for the memory of a small batch. "auto" finds the largest
            that fits, the smallest of several processes'. With batch norm, statistics are those of a micro-batch. None
            is the plain step, both views at once.
        memory: the budget of "auto", such as "20GiB"; default what is free.
        checkpoint_stages: keep the activations between the stages of the encoder alone, and compute the others again in
            the backward. Beside it `accelerate` fuses in known blocks and nn.Sequentials, and rebuilds no forward,
            which would go past the stages.
        device: "auto", "cpu", "cuda" or "cuda:N".
        num_workers: processes that decode images from a folder; 0 decodes in this one; default one a core, at most 8.
        seed: of weights, data order and augmentation.
        knn_every: epochs between kNN evaluations (k = 20, or 200 from 10,000 images up; t = 0.07); 0 for none.
        probe_every: epochs between evaluations of the online linear probe, which learns from h at every step and leaves
            the encoder as it would be without it (`ssl_fast.online.OnlineProbe`); 0 for none.
        log_every: steps between rows of metrics.jsonl.
        save_every: steps between checkpoints, beside the one at the end of each epoch.
        keep_every: epochs between checkpoints kept as epoch_NNNN.pt; 0 keeps only last.pt.
        resume: continue the run in `out` from its last checkpoint; only data_dir, device, num_workers, memory and the
            number of processes may differ. A micro-batch that was found stays. "auto" starts the run where there is
            none yet: for launchers that start it again, such as torchrun with --max-restarts.
        overwrite: replace the run in `out`.
        method_args: further arguments of the method; for SimCLR head="nonlinear" | "linear" | "none", dim=128,
            temperature=0.5; for Barlow Twins dim=8192, lambda_param=5e-3; for both strategy="gather" | "ring", how
            embeddings of several processes meet (ring: in the memory of a few blocks); for MoCo dim=128, K=65536,
            m=0.999, T=0.07 (0.2 in v2), mlp=False (True in v2), and bn_splits=8, the parts of a batch, or of a
            micro-batch, that batch norm sees apart. Few images want a short queue and a quick key encoder: K=4096,
            m=0.99 for CIFAR-10.

    Returns:
        A dict: `checkpoint`, `step`, `epoch`, and the last `loss`, `std`, `knn` and `probe` recorded.

    Raises:
        ValueError, FileNotFoundError, FileExistsError: before anything is written, for arguments that do not fit; in
            the first step, for a memory that does not hold one row.
        FloatingPointError: when the loss is no longer finite; the last checkpoint is from before.
        KeyboardInterrupt: after Ctrl-C, once a checkpoint of the current step is saved.

    Example:
        >>> train("out/digits", data="digits", model="convnet", epochs=50)
    """
    config = check_arguments(locals())
    team, recipe = Team(pick_device, device), METHODS[method]
    run = Run(out, config, resume, overwrite, defaults(train, method), team.leads)
    if not run.resume:
        check_warmup(config)
    chosen, local_batch = team.device, team.share(batch_size)
    with team.first():  # which downloads
        images = load_data(data, data_dir, image_size)
    _check_batch(batch_size, images)
    workers = min(8, os.cpu_count() or 1) if num_workers is None else num_workers

    seed_everything(seed)
    encoder, features = build_encoder(model, images.size, images.channels, stem)
    if accelerate:
        encoder = accelerated(encoder, trace=not checkpoint_stages).model  # a rebuilt forward goes past its stages
    if checkpoint_stages:
        checkpointed(encoder)
    network = recipe.build(encoder, features, **method_args).to(chosen)
    network.check_batch(local_batch, micro_batch)
    network.to(memory_format=torch.channels_last)
    norms = [accelerated(network, trace=False).summary] if accelerate else []
    views = TwoViews(_policy(augment, recipe, images), images.size, seed=seed)
    optimizer = recipe.optimizer if optimizer == "auto" else optimizer
    if optimizer == recipe.optimizer:
        lr = recipe.lr * batch_size / 256 if lr is None and recipe.lr else lr
        weight_decay = recipe.weight_decay if weight_decay is None else weight_decay
    own = optimizer == recipe.optimizer
    optim = build_optimizer(network, optimizer, batch_size, lr, weight_decay, recipe.bias_lr if own else 1.0)
    factor_of = SCHEDULES[recipe.schedule if schedule == "auto" else schedule]
    peak = [group["lr"] for group in optim.param_groups]
    seen, labels = _Seen(network.head), images.train.labels if probe_every and images.test else None
    probe = None if labels is None or not team.leads else OnlineProbe(features, int(labels.max()) + 1, chosen)

    steps_per_epoch = len(images.train) // batch_size
    total = epochs * steps_per_epoch
    warmup = round((min(10, epochs * recipe.warmup) if warmup_epochs is None else warmup_epochs) * steps_per_epoch)
    if not team.leads:  # draws of the network itself, as dropout's, differ between processes
        seed_everything(seed_of((seed, team.rank)))
    step = _restore(run.saved, network, optim, images, team, seed) if run.saved else 0
    if probe and run.saved and run.saved.get("probe"):  # which starts now in a run from before there was one
        probe.load_state_dict(run.saved["probe"])
    cached = None
    if micro_batch is not None:
        states = 0 if run.saved else {"adamw": 2}.get(optimizer, 1)  # tensors that the optimizer will hold of each
        reserve = states * sum(p.numel() * p.element_size() for p in network.parameters() if p.requires_grad)
        cached = CachedStep(micro_batch, memory, reserve=reserve)
        cached.micro_batch = run.saved["micro_batch"] if run.saved else cached.micro_batch
    model_of_all = team.wrap(network)
    if team.world > 1 and recipe.sync_norms:  # DistributedDataParallel takes none on a CPU: ours run there
        convert_sync_batchnorm(network)

    evaluated = encoder

    def measure() -> None:
        """What is due after this epoch; before the first, the random encoder, which the curve starts from."""
        nonlocal evaluated
        epoch = step // steps_per_epoch
        knn, probes = (bool(n) and (epoch % n == 0 or step == total) for n in (knn_every, probe_every))
        if images.test is None or not (knn or (probes and step)):
            return
        team.share_buffers(encoder)
        evaluated = folded(evaluated, images, chosen)
        test = encode(evaluated, images.test, images.size, chosen, num_workers=workers, together=True)
        row: dict[str, Any] = {"step": step, "epoch": round(step / steps_per_epoch, 4)}
        row |= knn_on(evaluated, images, chosen, workers, test, together=True) if knn else {}
        row |= {"probe": round(probe.accuracy(*test), 6)} if probe and probes and step else {}
        run.record(row)
        progress.show(row, line=True)

    def save() -> None:
        epoch, rest = divmod(step, steps_per_epoch)
        keep = keep_every and not rest and epoch % keep_every == 0
        facts = {"args": run.config, "named": isinstance(model, str), "step": step}
        facts |= {"images": len(images.train), "image_size": images.size, "channels": images.channels}
        facts |= {"micro_batch": cached and cached.micro_batch, "probe": probe and probe.state_dict()}
        state = {"model": network.state_dict(), "optimizer": optim.state_dict(), "rng": everyone(rng_state())}
        run.save(facts | state, copy=f"epoch_{epoch:04d}.pt" if keep else None)

    team.wait()  # until every process has looked into the folder
    run.open()
    progress, watch = Progress(total, step, shown=team.leads), Stopwatch()
    try:
        for note in [*images.notes, _summary(run, network, images, chosen, total, step), *norms]:
            log.info("%s", note)
        if knn_every and images.test is None:
            log.info("kNN is skipped: %s has no labels", images.name)
            knn_every = 0
        if probe_every and labels is None:
            log.info("the online probe is skipped: the training images of %s have no labels", images.name)
            probe_every = 0
        with Interruption() as interruption:
            if step == 0:
                measure()
            network.train()
            watch.restart()
            batches = _batches(images, team, workers, batch_size, views, step, epochs)
            for batch, indices, (view1, view2) in watch.waiting(batches):
                if step == 0 and team.leads:
                    plot_views(batch, view1, view2, run.plots / "views.png")
                factor = factor_of(step, total, warmup)
                for group, rate in zip(optim.param_groups, peak, strict=True):
                    group["lr"] = rate * factor
                optim.zero_grad(set_to_none=True)
                seen.h.clear()
                with torch.autocast(chosen.type, torch.bfloat16, enabled=precision == "bf16"):
                    loss = network.cached(view1, view2, cached) if cached else model_of_all(view1, view2)
                if cached:
                    team.average_gradients(network)
                else:
                    loss.backward()
                    team.check_gradients(network)
                optim.step()
                if probe and labels is not None:
                    rows = recipe.trained_views * len(batch)
                    h = torch.cat(seen.h)[-rows:]  # a search for the micro-batch has others before
                    probe.learn(h, labels[indices].repeat(recipe.trained_views).to(chosen))
                step += 1
                watch.count(len(batch) * team.world)

                epoch_ends = step % steps_per_epoch == 0
                logs, saves = step % log_every == 0, epoch_ends or (save_every and step % save_every == 0)
                # Processes answer Ctrl-C together; to ask them at every step would make a GPU wait.
                stops = team.any(interruption.requested) if team.world == 1 or logs or saves else False
                value = _finite(team.mean(loss), step, run) if logs or saves or stops else math.nan
                if logs:
                    z = gather(seen.z.float())
                    row = {"step": step, "epoch": round(step / steps_per_epoch, 4), "loss": value}
                    row |= {"lr": peak[0] * factor, "std": embedding_std(z), **watch.lap()}
                    run.record(row)
                    progress.show(row)
                    if team.leads and len(z) > 1:
                        _warn_of_collapse(row["std"], z.shape[1])
                if saves or stops:
                    with watch.paused():
                        if epoch_ends:
                            measure()
                        save()
                if stops and step < total:
                    raise KeyboardInterrupt
        if team.leads:
            missing = draw_pictures(run.out, encoder, network.head, images, chosen, workers)
            write_report(run.out, describe(step, total), missing)
            log.info("done: %s", run.last)
        team.wait()
    except KeyboardInterrupt:
        hint = f"continue with the same arguments and resume=True, or by `ssl-fast train out={run.out} resume=true`"
        log.info("interrupted at step %d of %d; %s", step, total, hint)
        raise
    except Exception:
        log.debug("stopped at step %d of %d", step, total, exc_info=True)
        raise
    finally:
        progress.close()
        run.close()
        team.close()
    return {"checkpoint": str(run.last), **{key: value for row in read_rows(run.metrics) for key, value in row.items()}}


def _batches(
    images: ImageData, team: Team, workers: int, batch_size: int, views: TwoViews, step: int, epochs: int
) -> Iterator[tuple[Tensor | PackedImages, Tensor, tuple[Tensor, ...]]]:
    """(uint8 images, their indices, their views) of every step from `step` on: this process's share of the batch."""
    loader, n = Loader(images.train, team.device, workers, whole=True), len(images.train)
    first, done = divmod(step, n // batch_size)
    for epoch in range(first, epochs):
        batches = epoch_batches(n, batch_size, views.seed, epoch)[done:]
        for batch, indices in loader([indices.chunk(team.world)[team.rank] for indices in batches]):
            yield batch, indices, views(batch, indices, epoch)
        done = 0


class _Seen:
    """Keeps what passes the head, without its graph: z of its last call, and h of every call with gradients."""

    z: Tensor

    def __init__(self, head: nn.Module) -> None:
        self.h: list[Tensor] = []
        head.register_forward_hook(self._keep)

    def _keep(self, head: nn.Module, inputs: Any, output: Tensor) -> None:
        self.z = output.detach()
        if torch.is_grad_enabled():
            self.h.append(inputs[0].detach())


def _check_batch(batch_size: int, images: ImageData) -> None:
    if batch_size > len(images.train):
        raise ValueError(
            f"batch_size: got {batch_size}, allowed: 2 to {len(images.train)}, the training images of {images.name}"
        )


def _policy(augment: str | Policy, recipe: Method, images: ImageData) -> Policy:
    if augment == "auto":
        small = recipe.augment_small if images.size <= SMALL_IMAGE else recipe.augment
        augment = recipe.augment_digits if images.name == "digits" else small
    return policy_named(augment)


def _restore(
    saved: dict[str, Any],
    network: nn.Module,
    optim: torch.optim.Optimizer,
    images: ImageData,
    team: Team,
    seed: int,
) -> int:
    """Load a checkpoint into a run, and return its step.

    On another number of processes the data and the views are the same; draws of the network itself, as dropout's, are
    other ones.
    """
    if saved["images"] != len(images.train):
        raise ValueError(
            f"resume: {images.name} had {saved['images']} training images, now {len(images.train)}; "
            "restore the files, or start another run in a new folder"
        )
    network.load_state_dict(saved["model"])
    optim.load_state_dict(saved["optimizer"])
    if len(saved["rng"]) == team.world:
        set_rng_state(saved["rng"][team.rank])
    else:
        seed_everything(seed_of((seed, team.rank, saved["step"])))
    return saved["step"]


def _summary(run: Run, network: nn.Module, images: ImageData, device: torch.device, total: int, step: int) -> str:
    millions = sum(p.numel() for p in network.parameters() if p.requires_grad) / 1e6
    what = f"{run.config['method']}, {millions:.3g} M parameters, on {len(images.train)} images of {images.name}"
    return f"{what} at {images.size} pixels, on {device}, steps {step} to {total}, in {run.out}"


def _finite(loss: Tensor, step: int, run: Run) -> float:
    value = loss.item()
    if not math.isfinite(value):
        kept = f"{run.last} is from before" if run.last.exists() else "no checkpoint was saved yet"
        raise FloatingPointError(
            f"the loss is {value} at step {step}; {kept}. Lower lr, lengthen warmup_epochs, or use precision=fp32"
        )
    return value


def _warn_of_collapse(std: float, dim: int) -> None:
    healthy = dim**-0.5
    if std < 0.02 * healthy:
        next_step = "they all point the same way. Lower lr, or raise temperature or batch_size"
        log.warning("collapse: the embeddings' std is %.1e, healthy is about %.1e; %s", std, healthy, next_step)
