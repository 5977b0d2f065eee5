"""A policy that draws its actions: python examples/policy.py [--bounds clamp] [--seed 1] [--quick]

Two tasks of Gymnasium: Pendulum-v1, and a walk past a disc where the expert goes now left, now right. An expert's
actions are recorded, `main.py` learns them from the states, and the table compares the expert, a policy trained by mean
squared error and the consistency policy in one and two steps. About five minutes on one CPU core.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import checkpoints  # noqa: E402
import networks  # noqa: E402
import sampler  # noqa: E402

EPISODES, WALKS = 50, 2000  # compared, from starts of which none is recorded; 50 say a share to within 7 points only
UP = 0.6  # share of the expert's walks that go above the disc

Act = Callable[[np.ndarray], np.ndarray]  # observations (B, K) -> actions (B, D), for B episodes side by side


# The two tasks and their experts --------------------------------------------------------------------------------------


def pendulum_expert(obs: np.ndarray) -> np.ndarray:
    """Pumps energy until the pendulum can be caught upright, then holds it: torques (B, 1) for (B, 3)."""
    cos, sin, speed = obs.T
    angle = np.arctan2(sin, cos)
    missing = 16 - (speed**2 / 2 + 15 * cos)  # energy at rest upright and a little more, less energy now, by m l^2 / 3
    pump = np.where(np.abs(speed) < 1e-3, 2.0, 0.4 * missing * speed)
    near = (np.abs(angle + 0.15 * speed) < 0.6) & (np.abs(angle) < 1.2)
    return np.where(near, -12 * angle - 3.5 * speed, pump).clip(-2, 2)[:, None]


class PastTheDisc(gymnasium.Env):
    """Walk from (-1, 0) to (1, 0) past a disc of radius 0.4 at (0, 0). Each step costs 0.1, the disc 10 and the end.

    Observation: position (2,). Action: velocity (2,) in [-1, 1]; a step is 0.2 of it.
    """

    observation_space = gymnasium.spaces.Box(-2, 2, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.position = np.array([-1, self.np_random.uniform(-0.02, 0.02)])
        return self.position.astype(np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.position = (self.position + 0.2 * np.clip(action, -1, 1)).clip(-2, 2)
        hit = bool(np.hypot(*self.position) < 0.4)
        there = bool(np.hypot(*(self.position - (1, 0))) < 0.2)
        return self.position.astype(np.float32), -0.1 - 10 * hit, hit or there, False, {}


def disc_expert(seed: int) -> Act:
    """Chooses a side at the start, above with probability UP, and keeps to it: velocities (B, 2) for (B, 2)."""
    rng = np.random.default_rng(seed)

    def act(obs: np.ndarray) -> np.ndarray:
        x, y = obs.T
        chosen = np.where(rng.random(len(obs)) < UP, 1.0, -1.0)
        side = np.where(np.abs(y) < 0.05, chosen, np.sign(y))
        goal = np.stack([np.where(x < 0, 0.1, 1.0), np.where(x < 0, 0.75 * side, 0.0)], 1)
        way = goal - obs
        return 0.9 * way / np.maximum(np.linalg.norm(way, axis=1, keepdims=True), 0.2)

    return act


gymnasium.register("PastTheDisc-v0", PastTheDisc, max_episode_steps=40)
TASKS: dict[str, tuple[str, Act]] = {
    "pendulum": ("Pendulum-v1", pendulum_expert),
    "past_the_disc": ("PastTheDisc-v0", disc_expert(seed=0)),
}


# Episodes -------------------------------------------------------------------------------------------------------------


def episodes(
    env_id: str, act: Act, seeds: range, shaken: float = 0.0, steps: int | None = None
) -> dict[str, np.ndarray]:
    """One episode for each start seed, side by side.

    shaken: standard deviation, in half action ranges, of noise on the actions taken but not on those recorded, so that
    the data say how to come back to the way. steps: longest episode; None: the task's own. Gives returns (E,), whether
    each went above y = 0 at x = 0 (E,), and all observations (N, K) and actions (N, D).
    """
    envs = [gymnasium.make(env_id, max_episode_steps=steps, disable_env_checker=True) for _ in seeds]
    obs = np.stack([env.reset(seed=seed)[0] for env, seed in zip(envs, seeds, strict=True)])
    low, high = envs[0].action_space.low, envs[0].action_space.high
    rng, returns, above = np.random.default_rng(seeds[0]), np.zeros(len(envs)), np.zeros(len(envs), bool)
    going, seen, done = np.arange(len(envs)), [], []
    while len(going):
        actions = act(obs[going]).astype(np.float32)
        seen.append(obs[going])
        done.append(actions)
        noise = shaken * (high - low) / 2 * rng.standard_normal(actions.shape)
        taken = (actions + noise).clip(low, high).astype(np.float32)
        ended = np.zeros(len(going), bool)
        for row, i in enumerate(going):
            obs[i], reward, terminated, truncated, _ = envs[i].step(taken[row])
            returns[i] += reward
            ended[row] = terminated or truncated
        if obs.shape[1] == 2:
            above[going] = np.where(obs[going, 0] < 0.1, obs[going, 1] > 0, above[going])
        going = going[~ended]
    return {"returns": returns, "above": above, "obs": np.concatenate(seen), "actions": np.concatenate(done)}


def record(task: str, path: Path, count: int) -> None:
    """Write the expert's actions in `count` episodes, their states and the action range, as data.name: npz reads it."""
    env_id, expert = TASKS[task]
    data = episodes(env_id, expert, range(count), shaken=0.1, steps=100)  # Pendulum's second half is all rest
    space = gymnasium.make(env_id).action_space
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {"vectors": data["actions"], "conditions": data["obs"], "low": space.low, "high": space.high}
    np.savez(path, **arrays)


# The policies ---------------------------------------------------------------------------------------------------------


def consistency_policy(path: Path, levels: list[float]) -> Act:
    """The policy in a checkpoint: actions drawn in len(levels) evaluations of the network; levels: sigmas, or times."""
    model, generator = checkpoints.load_model(path), torch.Generator().manual_seed(0)

    @torch.inference_mode()
    def act(obs: np.ndarray) -> np.ndarray:
        condition = model.codec.condition(torch.as_tensor(obs, dtype=torch.float32))
        z, *more = (torch.randn(len(obs), *model.shape, generator=generator) for _ in levels)
        draw = sampler.multistep if model.clock == "sigma" else sampler.jumps
        x = draw(model, z, levels, lambda i: more[i - 1], condition=condition)
        return model.codec.restore(x).numpy()

    return act


def mse_policy(path: Path, like: networks.Preconditioner, steps: int, seed: int, batch: int = 256) -> Act:
    """The same network trained on the same data by mean squared error: no noise in, the mean action out."""
    with np.load(path) as arrays:
        actions, states = torch.from_numpy(arrays["vectors"]), torch.from_numpy(arrays["conditions"])
    codec, old = like.codec, like.model
    torch.manual_seed(seed)
    net = networks.MLP(old.shape, old.condition_dim, old.map_layer0.out_features, len(old.blocks))
    x, condition = codec.normalise(actions), codec.condition(states)
    optimizer = torch.optim.RAdam(net.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows = torch.randint(len(x), (batch,))
        nothing = torch.zeros_like(x[rows])
        loss = (net(nothing, nothing[:, 0], condition=condition[rows]) - x[rows]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    @torch.inference_mode()
    def act(obs: np.ndarray) -> np.ndarray:
        nothing = torch.zeros(len(obs), *old.shape)
        given = codec.condition(torch.as_tensor(obs, dtype=torch.float32))
        return codec.restore(net(nothing, nothing[:, 0], condition=given)).numpy()

    return act


def milliseconds(act: Act, obs: np.ndarray, calls: int = 200) -> float:
    """Median time of one action for one state, the batch of a robot."""
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        act(obs)
        times.append(1000 * (time.perf_counter() - start))
    return float(np.median(times))


# The comparison -------------------------------------------------------------------------------------------------------


def compare(task: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Record, train and try the policies of one task: a row each."""
    (env_id, expert), folder = TASKS[task], Path(args.out)
    data, run = folder / f"{task}.npz", folder / f"{task}-seed{args.seed}"
    if not data.exists():
        record(task, data, 20 if args.quick else 1000 if task == "pendulum" else 2000)
    settings = [f"run.name={task}", f"run.dir={run}", f"run.seed={args.seed}"]
    settings += [f"data.path={data}", f"data.bounds={args.bounds}"]
    settings += [f"objective.name={args.objective}"] if args.objective else []
    if args.quick:
        settings += ["train.steps=40", "train.lr_warmup=4", "train.log_every=20", "metrics.num=100"]
    config = ROOT / "configs" / "policy_pendulum.yml"
    settings += ["--resume"] if run.exists() else []
    subprocess.run([sys.executable, str(ROOT / "main.py"), "--cfg", str(config), *settings], check=True)
    ckpt = run / "checkpoints" / "last.ckpt"
    model = checkpoints.load_model(ckpt)
    steps = checkpoints.load(ckpt)["step"]
    top, second = (model.sigma_max, args.second) if model.clock == "sigma" else (1.0, 0.5)
    policies = {
        "expert": expert,
        "mean squared error": mse_policy(data, model, steps, args.seed),
        "consistency, 1 step": consistency_policy(ckpt, [top]),
        "consistency, 2 steps": consistency_policy(ckpt, [top, second]),
    }
    first = 100_000 * (args.seed + 1)
    seeds = range(first, first + (3 if args.quick else EPISODES))
    walks = range(first, first + (20 if args.quick else WALKS))
    rows = []
    for name, act in policies.items():
        ran = episodes(env_id, act, seeds)
        row = {"task": task, "policy": name, "return": ran["returns"].mean()}
        row["ms"] = milliseconds(act, ran["obs"][:1], 20 if args.quick else 200)
        if task == "past_the_disc":
            ran = episodes(env_id, act, walks)
            hit = ran["returns"] < -9
            row |= {"above": (ran["above"] & ~hit).mean(), "below": (~ran["above"] & ~hit).mean(), "hit": hit.mean()}
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = ["| task | policy | return | above / below / disc hit | ms per action |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        shares = " / ".join(f"{row[k]:.1%}" for k in ("above", "below", "hit")) if "above" in row else ""
        cells = [row["task"], row["policy"], f"{row['return']:.2f}", shares, f"{row['ms']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bounds", choices=("clamp", "tanh"), default="tanh", help="how actions stay in range")
    parser.add_argument("--second", type=float, default=0.8, help="noise level of the second of two steps")
    parser.add_argument("--objective", help="another method without a teacher, as meanflow; give another --out too")
    parser.add_argument("--seed", type=int, default=0, help="of the training, and of the starts that are compared")
    parser.add_argument("--out", default="runs/policy", help="folder for data and runs; what is there is used")
    parser.add_argument("--quick", action="store_true", help="a trial in seconds, whose figures mean nothing")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = [row for task in TASKS for row in compare(task, args)]
    print(f"\nepisodes from the same starts, bounds: {args.bounds}, seed: {args.seed}\n\n{table(rows)}")
    expert, one = (next(r["return"] for r in rows if r["policy"] == p) for p in ("expert", "consistency, 1 step"))
    print(f"\npendulum, 1 step: {abs(one - expert) / abs(expert):.1%} from the expert's mean return")
    return rows


if __name__ == "__main__":
    main()
