"""Train the demo model on python_docs: `python -m bs_exp.demo.train`; the defaults are the recipe of the committed one.

The learning rate warms up, stays constant and decays only at the end (WSD). So until the decay starts, a run does not
depend on `--steps`: stop it at any time and start it again with another number, and the outcome is that of one run.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from bs_exp.demo.export import export, heldout_loss
from bs_exp.demo.training_data import END_OF_TEXT_ID, Batches, TrainingData, load_training_data
from bs_exp.files import replacing

WORK_FOLDER = Path("outputs/demo_training")
MODEL_FOLDER = Path(__file__).parent / "model"

VOCAB_SIZE = 4096
CONTEXT = 512
LOG_EVERY, SAVE_EVERY, EVALUATE_EVERY = 20, 100, 500


@dataclass(frozen=True, kw_only=True)
class TrainingRecipe:
    """Everything the trained weights depend on, besides the data."""

    steps: int = 2400
    optimizer: str = "muon"
    """`muon`: Muon for the matrices inside the blocks, AdamW for the rest; `adamw`: AdamW for all."""
    learning_rate: float = 6e-3
    weight_decay: float = 0.1
    """On matrices; embeddings and norms have none."""
    warmup_steps: int = 100
    decay_share: float = 0.2
    batch_size: int = 16
    clip_norm: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps <= self.warmup_steps:
            raise ValueError(f"steps must be more than the {self.warmup_steps} warm-up steps, got {self.steps}.")
        if self.optimizer not in ("muon", "adamw"):
            raise ValueError(f"optimizer must be muon or adamw, got {self.optimizer!r}.")

    @property
    def decay_start(self) -> int:
        """First step with a reduced learning rate; all before it are the same for every `steps`."""
        return self.steps - round(self.decay_share * self.steps)

    def rate_at(self, step: int) -> float:
        """The learning rate of a step."""
        warm = min(1.0, (step + 1) / self.warmup_steps)
        cool = min(1.0, (self.steps - step) / (self.steps - self.decay_start))
        return self.learning_rate * warm * cool

    def stable_settings(self) -> dict[str, Any]:
        """The settings that two runs must share for one to continue the other's checkpoint before the decay."""
        return {name: value for name, value in asdict(self).items() if name not in ("steps", "decay_share")}


@dataclass(frozen=True, eq=False)
class Trainee:
    """The model and its optimisers: what a step changes and a checkpoint holds."""

    model: LlamaForCausalLM
    optimizers: tuple[torch.optim.Optimizer, ...]

    def state(self) -> dict[str, Any]:
        """All that `restore` needs to continue the training, as plain data and tensors."""
        return {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take over a `state` of the same recipe."""
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def new_trainee(recipe: TrainingRecipe) -> Trainee:
    """A randomly initialised model of 2.0 M parameters with fresh optimisers."""
    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=352,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=END_OF_TEXT_ID,
        eos_token_id=END_OF_TEXT_ID,
        pad_token_id=END_OF_TEXT_ID,
    )
    model = LlamaForCausalLM(config)
    matrices = [parameter for name, parameter in model.named_parameters() if parameter.ndim == 2 and ".layers." in name]
    others = [parameter for name, parameter in model.named_parameters() if parameter.ndim < 2 or ".layers." not in name]
    rate, betas = recipe.learning_rate, (0.9, 0.95)
    adamw_groups: list[dict[str, Any]] = [{"params": others, "weight_decay": 0.0}]
    optimizers: list[torch.optim.Optimizer] = []
    if recipe.optimizer == "muon":
        optimizers.append(
            torch.optim.Muon(matrices, lr=rate, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw")
        )
    else:
        adamw_groups.append({"params": matrices, "weight_decay": recipe.weight_decay})
    optimizers.append(torch.optim.AdamW(adamw_groups, lr=rate, betas=betas, fused=True))
    return Trainee(model, tuple(optimizers))


class Checkpoints:
    """Two files: `stable.pt`, the newest from before the decay, and `decay.pt`, from one run's decay."""

    def __init__(self, folder: Path, recipe: TrainingRecipe, fingerprint: str) -> None:
        self._folder = folder
        self._recipe = recipe
        self._origin = {"fingerprint": fingerprint, "settings": recipe.stable_settings()}

    def save(self, step: int, trainee: Trainee) -> None:
        """Keep the state before `step`."""
        name = "stable.pt" if step <= self._recipe.decay_start else "decay.pt"
        state = {**self._origin, "schedule": self._schedule, "step": step, **trainee.state()}
        with replacing(self._folder / name) as partial:
            torch.save(state, partial)

    def resume(self, trainee: Trainee) -> int:
        """Restore the most advanced state that belongs to this run; returns its step, 0 if there is none.

        Raises ValueError if the files come from other data or settings, or are past the start of this run's decay.
        """
        decay, stable = self._load("decay.pt"), self._load("stable.pt")
        if decay is not None and decay["schedule"] == self._schedule:
            trainee.restore(decay)
            return int(decay["step"])
        if stable is None:
            return 0
        step = int(stable["step"])
        if step > self._recipe.decay_start:
            raise ValueError(
                f"steps={self._recipe.steps} starts its decay at step {self._recipe.decay_start}, "
                f"but {self._folder / 'stable.pt'} is already at step {step}; "
                f"ask for at least {shortest_run(step, self._recipe.decay_share)} steps."
            )
        trainee.restore(stable)
        return step

    @property
    def _schedule(self) -> dict[str, float]:
        return {"steps": self._recipe.steps, "decay_share": self._recipe.decay_share}

    def _load(self, name: str) -> dict[str, Any] | None:
        path = self._folder / name
        if not path.is_file():
            return None
        state: dict[str, Any] = torch.load(path, weights_only=True)
        if different := [key for key, value in self._origin.items() if state[key] != value]:
            raise ValueError(
                f"{path} comes from a run with other {' and '.join(different)}; move it away to start afresh, "
                "or restore what it was made with."
            )
        return state


def shortest_run(step: int, decay_share: float) -> int:
    """The smallest number of steps whose decay does not start before `step`."""
    steps = step
    while steps - round(decay_share * steps) < step:
        steps += 1
    return steps


def train(recipe: TrainingRecipe, data: TrainingData, folder: Path) -> LlamaForCausalLM:
    """The trained model, fp32; resumes from `folder` and logs to stdout."""
    trainee = new_trainee(recipe)
    checkpoints = Checkpoints(folder, recipe, data.fingerprint)
    batches = Batches(stream=data.train, batch_size=recipe.batch_size, length=CONTEXT, seed=recipe.seed)
    first = checkpoints.resume(trainee)
    print(recipe)
    print(
        f"{batches.steps_per_epoch} steps per epoch; decay from {recipe.decay_start}; starting at {first}", flush=True
    )
    losses: list[float] = []
    clock = time.perf_counter()
    for step, loss in _steps(first, recipe, trainee, batches):
        losses.append(loss)
        done = step + 1
        if done % LOG_EVERY == 0 or done == recipe.steps:
            rate = len(losses) * recipe.batch_size * CONTEXT / (time.perf_counter() - clock)
            tokens, mean = done * recipe.batch_size * CONTEXT, sum(losses) / len(losses)
            print(
                f"step {done} tokens {tokens} loss {mean:.4f} lr {recipe.rate_at(step):.2e} tok/s {rate:.0f}",
                flush=True,
            )
            losses.clear()
            clock = time.perf_counter()
        if done % SAVE_EVERY == 0 or done in (recipe.decay_start, recipe.steps):
            checkpoints.save(done, trainee)
        if done % EVALUATE_EVERY == 0:
            print(f"step {done} heldout {heldout_loss(trainee.model, data.heldout, CONTEXT):.4f}", flush=True)
            clock = time.perf_counter()
    return trainee.model


def _steps(first: int, recipe: TrainingRecipe, trainee: Trainee, batches: Batches) -> Iterator[tuple[int, float]]:
    """Update the trainee step by step; yields the step and its mean training loss in nats per token."""
    loss_of = _compiled_loss(trainee.model)
    for step in range(first, recipe.steps):
        trainee.model.train()
        inputs, targets = batches.at(step)
        loss = loss_of(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainee.model.parameters(), recipe.clip_norm)
        for optimizer in trainee.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate_at(step)
            optimizer.step()
            optimizer.zero_grad()
        yield step, loss.item()


def _compiled_loss(model: LlamaForCausalLM) -> Callable[[Tensor, Tensor], Tensor]:
    """Mean cross entropy in bf16 autocast, compiled: on an AVX-512 CPU four times as fast as eager fp32."""

    def loss_of(inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=inputs, use_cache=False).logits
        return functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    return torch.compile(loss_of)


def _parse_arguments() -> argparse.Namespace:
    default = TrainingRecipe()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=default.steps, help=f"updates in all, default {default.steps}")
    parser.add_argument(
        "--decay-now",
        action="store_true",
        help="resume with the fewest steps that stable.pt allows, instead of --steps",
    )
    parser.add_argument("--optimizer", choices=["muon", "adamw"], default=default.optimizer)
    parser.add_argument(
        "--learning-rate", type=float, default=default.learning_rate, help=f"default {default.learning_rate}"
    )
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--work-folder", type=Path, default=WORK_FOLDER, help="tokens and checkpoints")
    parser.add_argument("--model-folder", type=Path, default=MODEL_FOLDER, help="where the finished model goes")
    return parser.parse_args()


def main() -> None:
    """Prepare the data, train, export."""
    arguments = _parse_arguments()
    folder: Path = arguments.work_folder
    folder.mkdir(parents=True, exist_ok=True)
    steps: int = arguments.steps
    if arguments.decay_now:
        stable = torch.load(folder / "stable.pt", weights_only=True)
        steps = shortest_run(stable["step"], TrainingRecipe().decay_share)
    recipe = TrainingRecipe(
        steps=steps, optimizer=arguments.optimizer, learning_rate=arguments.learning_rate, seed=arguments.seed
    )
    data = load_training_data(folder, VOCAB_SIZE)
    model = train(recipe, data, folder)
    tokens_seen = recipe.steps * recipe.batch_size * CONTEXT
    export(model, data, arguments.model_folder, context=CONTEXT, tokens_seen=tokens_seen, recipe=asdict(recipe))


if __name__ == "__main__":
    main()
