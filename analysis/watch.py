"""Plays episodes with the networks of a run of any of the four scripts, and prints their returns.

    python analysis/watch.py runs/td3_hyper/Hopper-v4/sa-hyper/seed1
    python analysis/watch.py RUN_DIR --video agent.mp4      # no display is needed
    python analysis/watch.py RUN_DIR --goal 1.5 --human     # a window; meta-RL: another task

Actions are deterministic. TD3 and SAC start as in their evaluation, so that the returns are those
of eval.csv (on the same device). MAML's policy plays without adaptation, or with --adapt after the
run's inner steps. PEARL plays as in its evaluation: before each episode, two trajectories with z
from the prior gather the context of the z that is watched; the oracle's z is the goal.
"""

import math
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import glfw
import gymnasium as gym
import imageio.v2 as imageio
import numpy as np
import torch
import tyro
from gradient_accuracy import load, read_config, saved_steps
from gradient_noise import draw_goals

import maml_hyper
import pearl_hyper
import sac_hyper
import td3_hyper
from hypernet import tune
from meta_envs import MetaVectorEnv
from td3_hyper import at_end, stop


@dataclass
class Args:
    run_dir: tyro.conf.Positional[Path]
    """the directory with the run's config.json"""
    step: int | None = None
    """plays the networks of step_STEP.pt; None means the last one there is"""
    episodes: int = 3
    """number of episodes"""
    goal: float | None = None
    """MAML, PEARL: the task; None means the run's first test goal"""
    adapt: bool = False
    """MAML: adapt the policy to the goal first"""
    video: Path | None = None
    """film the episodes, FILE.mp4, at most 30 frames a second"""
    human: bool = False
    """show the episodes in a window"""

    def __post_init__(self):
        if self.episodes < 1:
            raise ValueError("--episodes must be at least 1")
        if self.video and self.video.suffix != ".mp4":
            raise ValueError(f"--video {self.video}: must end with .mp4")
        if self.video and self.human:
            raise ValueError("--video and --human exclude each other")


def maml_policy(policy: maml_hyper.Policy, goal: float, adapt: bool, run_args) -> Callable:
    """obs (obs,) -> the policy's mean action (action,)"""
    steps, context = [], torch.tensor([[goal]], dtype=torch.float32)
    if adapt:
        rng, episodes = np.random.default_rng(run_args.seed + 100), run_args.episodes_per_goal
        envs = MetaVectorEnv(run_args.env_id, [goal], episodes, horizon=run_args.horizon)
        _, _, steps = maml_hyper.adapt_and_sample(policy, envs, rng, run_args)

    def act(obs: torch.Tensor) -> torch.Tensor:
        with maml_hyper.adapted(policy, steps):
            return policy(context, obs[None, None]).mean[0, 0].clamp(-1, 1)

    return act


def pearl_policy(agent: pearl_hyper.Agent, goal: float, rng, run_args) -> Callable:
    """obs (obs,) -> the action (action,) of a z from the posterior"""
    goals, context = np.array([goal]), None
    if run_args.context == "learned":
        envs = MetaVectorEnv(run_args.env_id, goals, 2, 1, run_args.horizon)
        z = pearl_hyper.sample_z(agent, np.repeat(goals, 2), None, rng, run_args)
        slots = np.ones(2, dtype=bool)
        played = pearl_hyper.rollout(agent.policy, z, envs, slots, rng, deterministic=True)
        context_width = agent.encoder.net.layers[0].in_features  # obs, action, reward
        context = torch.cat(played)[None, :, :context_width]
    generated = agent.policy.generate(pearl_hyper.sample_z(agent, goals, context, rng, run_args))
    return lambda obs: agent.policy.dynamic(generated, obs[None, None])[0][0, 0].tanh()


def main(args: Args) -> None:
    run_dir = args.run_dir
    meta_scripts = maml_hyper, pearl_hyper
    script, run_args = read_config(run_dir / "config.json", td3_hyper, sac_hyper, *meta_scripts)
    meta, last = script in meta_scripts, saved_steps(run_dir)[-1]
    file = run_dir / f"step_{last if args.step is None else args.step}.pt"
    if args.goal is not None and not meta:
        stop(f"--goal is for runs of MAML and PEARL, {run_dir} is one of {script.__name__}.py")
    if args.adapt and not getattr(run_args, "num_adapt_steps", 0):
        stop(f"--adapt is for runs of MAML with inner steps, {run_dir} has none")
    glfw.ERROR_REPORTING = "ignore"
    if args.human and not (glfw.init() and glfw.create_window(1, 1, "", None, None)):
        stop("--human needs a display with OpenGL; --video FILE.mp4 does without")
    glfw.terminate()
    if args.video and sys.platform == "linux":
        os.environ.setdefault("MUJOCO_GL", "egl")  # draws without a display
    mode = "human" if args.human else "rgb_array" if args.video else None
    options = {"render_mode": mode} if mode else {}  # not every environment has one
    if meta:
        goal = draw_goals(run_args)[1][0] if args.goal is None else args.goal
        options["max_episode_steps"] = run_args.horizon
        try:
            env = gym.make(run_args.env_id, goal=goal, **options)
            at_end.callback(env.close)
        except ValueError as error:
            stop(f"--goal {goal}: {error}")
    else:
        env = script.make_env(run_args, **options)

    if getattr(env.unwrapped, "mujoco_renderer", None) and env.unwrapped.model.ncam:
        env.unwrapped.mujoco_renderer.camera_id = 0  # follows the agent
    env.reset(seed=run_args.seed + 100)
    try:
        if args.video:
            env.render().shape  # noqa: B018, fails if there is no picture
    except Exception as error:  # of many kinds, from several libraries
        sys.unraisablehook = lambda _: None  # Gymnasium's viewer fails again when it is deleted
        hint = "for MuJoCo, on Debian: apt-get install libegl1 libgl1-mesa-dri"
        stop(f"{run_args.env_id} cannot be drawn: {error or type(error).__name__} ({hint})")

    dims = env.observation_space.shape[0], env.action_space.shape[0]
    networks = (maml_hyper.Policy if script is maml_hyper else script.Agent)(*dims, run_args)
    load(networks, file)
    rng = np.random.default_rng(run_args.seed + 100)
    if script is maml_hyper:
        policy = maml_policy(networks, goal, args.adapt, run_args)
    elif not meta:
        policy = networks.actor
    fps = env.metadata.get("render_fps", 30)
    every = math.ceil(fps / 30)
    print(f"{file}{f', goal {goal:g}' if meta else ''}")
    returns = []
    if args.video:
        film = imageio.get_writer(args.video, fps=fps / every, macro_block_size=2)
        at_end.enter_context(film)
    for episode in range(args.episodes):
        if script is pearl_hyper:
            policy = pearl_policy(networks, goal, rng, run_args)
        obs, _ = env.reset(seed=run_args.seed + 100 if episode == 0 else None)
        returns.append(0.0)
        length, done = 0, False
        while not done:
            if args.video and length % every == 0:
                film.append_data(env.render())
            with torch.no_grad():
                action = policy(torch.from_numpy(obs).float()).numpy()
            obs, reward, terminated, truncated, _ = env.step(action)
            returns[-1] += reward
            length, done = length + 1, terminated or truncated
        print(f"episode {episode}: return {returns[-1]:.2f}, {length} steps", flush=True)
    print(f"mean of {args.episodes}: {np.mean(returns):.2f}")


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C needs no clean-up
    try:
        args = tyro.cli(Args, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,))
        tune("cpu", "float32")
        with at_end, sac_hyper.at_end:  # closes the environment
            main(args)
    except OSError as error:  # the film cannot be written, or nobody reads what is printed
        stop(str(error))
