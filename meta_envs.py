"""The five families of meta-RL tasks (Sec. 5.1): one at a time, or hundreds side by side.

    env = gym.make("HalfCheetahVel-v0", goal=1.5)          # a plain Gymnasium environment
    envs = MetaVectorEnv("HalfCheetahVel-v0", goals=[0.5, 1.5], episodes_per_goal=20)  # 40 of them

A task is a goal: a velocity in m/s along x, or a direction, -1 or +1. The physics is that of
Gymnasium's HalfCheetah-v4 and Ant-v4, 0.05 s a step.
"""

import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import gymnasium as gym
import mujoco
import numpy as np
from gymnasium.envs.mujoco import MujocoEnv
from gymnasium.vector.utils import batch_space

FRAME_SKIP = 5  # simulation steps of one environment step
HORIZON = 200  # environment steps of an episode (released)
RESET_NOISE = 0.1  # half width of the uniform noise on qpos, std of the normal on qvel (released)


@dataclass(frozen=True)
class Family:
    """What the tasks of a family share; c is the control, v the torso's velocity along x in m/s."""

    robot: str
    """Gymnasium's model, without .xml"""
    train: tuple[float, float]
    """goals: the two directions, or the range of the velocities"""
    test: tuple[float, float]
    """the same for the test goals"""
    velocity: bool
    """reward -|v - goal|, else goal * v"""
    control_cost: float
    """times |c|², subtracted from the reward"""
    bonus: float
    """added to the reward of every step"""

    def reward(self, goal: np.ndarray, v: np.ndarray, action: np.ndarray) -> np.ndarray:
        """goal (...), v (...), action (..., action) -> (...)"""
        progress = -abs(v - goal) if self.velocity else goal * v
        return progress - self.control_cost * np.square(action).sum(-1) + self.bonus

    def observe(self, qpos: np.ndarray, qvel: np.ndarray) -> np.ndarray:
        """qpos (..., nq), qvel (..., nv) -> (..., 20) for the cheetah, (..., 27) for the ant."""
        if self.robot == "ant":
            return np.concatenate((qpos[..., 2:], qvel), -1)
        x, z = qpos[..., :1], qpos[..., 1:2] + 0.7  # the cheetah's torso hangs at 0.7 m
        return np.concatenate((qpos[..., 1:], qvel, x, 0 * x, z), -1)

    def fallen(self, qpos: np.ndarray) -> np.ndarray:
        """qpos (..., nq) -> (...): the ant's torso has left [0.2, 1.0] m; a cheetah never falls."""
        if self.robot != "ant":
            return np.zeros(qpos.shape[:-1], dtype=bool)
        z = qpos[..., 2]
        return ~((0.2 <= z) & (z <= 1.0))


BOTH, RANGE = (-1.0, 1.0), (0.0, 3.0)
# The released rewards without the contact cost, which MuJoCo 2 and later left at zero.
# fmt: off
FAMILIES = {  # robot, train goals, test goals, velocity, cost of |c|², bonus
    "HalfCheetahFwdBack-v0":   Family("half_cheetah", BOTH,       BOTH,       False, 0.05,  0.0),
    "AntFwdBack-v0":           Family("ant",          BOTH,       BOTH,       False, 0.005, 0.05),
    "HalfCheetahVel-v0":       Family("half_cheetah", RANGE,      RANGE,      True,  0.05,  0.0),
    "AntVel-v0":               Family("ant",          RANGE,      RANGE,      True,  0.005, 1.05),
    "HalfCheetahVelMedium-v0": Family("half_cheetah", (0.0, 2.5), (2.5, 3.0), True,  0.05,  0.0),
}
# fmt: on


def get_family(env_id: str) -> Family:
    """Raises ValueError, which lists the families, for an unknown id."""
    if env_id not in FAMILIES:
        raise ValueError(f"unknown task family {env_id!r}, choose from {', '.join(FAMILIES)}")
    return FAMILIES[env_id]


def sample_goals(
    env_id: str, num: int, rng: np.random.Generator, split: str = "train"
) -> np.ndarray:
    """Goals (num,) of split "train" or "test": uniform velocities, or -1 and +1 in equal shares."""
    family = get_family(env_id)
    goals = {"train": family.train, "test": family.test}[split]
    if family.velocity:
        return rng.uniform(*goals, num)
    return rng.permutation(np.resize(goals, num))  # as many of the one as of the other


def check_goals(env_id: str, goals) -> np.ndarray:
    """goals as float64 (T,); warns of one that the family does not have."""
    family = get_family(env_id)
    goals = np.asarray(goals, dtype=np.float64)
    if goals.ndim != 1 or not len(goals) or not np.isfinite(goals).all():
        raise ValueError(f"goals must be one or more finite numbers, not {goals}")
    low, high = min(family.train + family.test), max(family.train + family.test)
    strange = (goals < low) | (goals > high) if family.velocity else abs(goals) != 1
    if strange.any():
        allowed = f"in [{low:g}, {high:g}]" if family.velocity else "-1 or 1"
        warnings.warn(f"{env_id}: goal {goals[strange][0]:g} is not {allowed}", stacklevel=3)
    return goals


def diverged(state: np.ndarray) -> np.ndarray:
    """state (..., n) -> (...): holds a number that MuJoCo calls bad, not finite or above 1e10."""
    return ~(abs(state) < mujoco.mjMAXVAL).all(-1)


class MetaEnv(MujocoEnv):
    """One task as a plain environment, `gym.make(env_id, goal=goal)`.

    A simulation that diverges terminates the episode in its last good state.
    """

    metadata = {
        "render_modes": ["human", "rgb_array", "depth_array", "rgbd_tuple"],
        "render_fps": 20,
    }

    def __init__(self, env_id: str, goal: float = 1.0, **kwargs):
        self.family, self.goal = get_family(env_id), check_goals(env_id, [goal])[0]
        super().__init__(f"{self.family.robot}.xml", FRAME_SKIP, None, **kwargs)
        self.model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_AUTORESET
        shape = self.family.observe(self.init_qpos, self.init_qvel).shape
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, shape, np.float64)

    def reset_model(self) -> np.ndarray:
        noise = self.np_random.uniform(-RESET_NOISE, RESET_NOISE, self.model.nq)
        speed = RESET_NOISE * self.np_random.standard_normal(self.model.nv)
        self.set_state(self.init_qpos + noise, self.init_qvel + speed)
        return self.family.observe(self.data.qpos, self.data.qvel)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        qpos, qvel = self.data.qpos.copy(), self.data.qvel.copy()
        self.do_simulation(action, self.frame_skip)
        bad = diverged(np.concatenate((self.state_vector(), self.data.qacc_warmstart)))
        if bad:
            self.set_state(qpos, qvel)
        v = (self.data.qpos[0] - qpos[0]) / self.dt
        terminated = bool(bad or self.family.fallen(self.data.qpos))
        if self.render_mode == "human":
            self.render()
        obs = self.family.observe(self.data.qpos, self.data.qvel)
        reward = float(self.family.reward(self.goal, v, np.asarray(action)))
        return obs, reward, terminated, False, {"x_velocity": v}


for env_id in FAMILIES:
    gym.register(env_id, entry_point=MetaEnv, max_episode_steps=HORIZON, kwargs={"env_id": env_id})


class MetaVectorEnv(gym.vector.VectorEnv):
    """`len(goals) * episodes_per_goal` simulations of one family, stepped by a pool of threads.

    Slot `i` has goal `goals[i // episodes_per_goal]`. Nothing resets by itself (autoreset mode
    DISABLED): a slot that has ended stays where it is, with reward 0 and its flags unchanged, and
    costs nothing until `reset(options={"reset_mask": mask})`, mask (num_envs,) bool, resets it. A
    simulation that diverges ends as terminated in its last good state, the others go on.

    A thread loads a simulation's qpos, qvel, warm start and control into its MjData, steps it and
    reads them back. (`mujoco.rollout` does not give the solver's warm start back, without which a
    trajectory departs from Gymnasium's within an episode.)

    num_threads: None is one a core. Raises ValueError for an unknown id or numbers below 1.
    """

    metadata = {"autoreset_mode": gym.vector.AutoresetMode.DISABLED}

    def __init__(
        self,
        env_id: str,
        goals,
        episodes_per_goal: int = 1,
        num_threads: int | None = None,
        horizon: int = HORIZON,
    ):
        num_threads = os.cpu_count() if num_threads is None else num_threads
        if min(episodes_per_goal, num_threads, horizon) < 1:
            raise ValueError("episodes_per_goal, num_threads and horizon must be at least 1")
        self.goals = check_goals(env_id, goals)
        self.episodes_per_goal, self.horizon = episodes_per_goal, horizon
        self.num_envs = len(self.goals) * episodes_per_goal
        self.spec = gym.spec(env_id)
        single = MetaEnv(env_id, goal=1.0)
        self.family, self.model, self.dt = single.family, single.model, single.dt
        self.single_observation_space = single.observation_space
        self.single_action_space = single.action_space
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)

        parts = mujoco.mjtState
        self.parts = int(
            parts.mjSTATE_QPOS | parts.mjSTATE_QVEL | parts.mjSTATE_WARMSTART | parts.mjSTATE_CTRL
        )
        nq, nv, nu = self.model.nq, self.model.nv, self.model.nu
        self.state = np.zeros((self.num_envs, nq + nv + nv + nu))
        self.qpos, self.qvel, self.warmstart, self.control = np.split(
            self.state, np.cumsum((nq, nv, nv)), axis=1
        )
        self.elapsed = np.zeros(self.num_envs, dtype=np.int64)
        self.terminated = np.zeros(self.num_envs, dtype=bool)
        self.truncated = np.ones(self.num_envs, dtype=bool)  # until the first reset
        self.data = [mujoco.MjData(self.model) for _ in range(num_threads)]
        self.pool = ThreadPoolExecutor(num_threads)

    def set_goals(self, goals) -> None:
        """Other goals, as many as before, from the next step on."""
        goals = check_goals(self.spec.id, goals)
        if len(goals) != len(self.goals):
            raise ValueError(f"there must be {len(self.goals)} goals, not {len(goals)}")
        self.goals = goals

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        """Start every slot, or those of `options["reset_mask"]`, from states of one generator."""
        super().reset(seed=seed)
        mask = (options or {}).get("reset_mask", np.ones(self.num_envs, dtype=bool))
        if not isinstance(mask, np.ndarray) or mask.dtype != bool or mask.shape != (self.num_envs,):
            raise ValueError(f"reset_mask must be a bool array of shape ({self.num_envs},)")
        num, nq, nv = mask.sum(), self.model.nq, self.model.nv
        self.state[mask] = 0
        noise = self.np_random.uniform(-RESET_NOISE, RESET_NOISE, (num, nq))
        self.qpos[mask] = self.model.qpos0 + noise
        self.qvel[mask] = RESET_NOISE * self.np_random.standard_normal((num, nv))
        self.elapsed[mask], self.terminated[mask], self.truncated[mask] = 0, False, False
        return self.family.observe(self.qpos, self.qvel), {}

    def simulate(self, data: mujoco.MjData, slots: np.ndarray) -> None:
        """Step these slots; MuJoCo releases the interpreter's lock while it does."""
        for slot in slots:
            row = self.state[slot]
            mujoco.mj_setState(self.model, data, row, self.parts)
            mujoco.mj_step(self.model, data, FRAME_SKIP)
            mujoco.mj_getState(self.model, data, row, self.parts)

    def step(self, actions: np.ndarray):
        """actions (num_envs, action) -> obs (num_envs, obs), reward, terminated, truncated, info"""
        actions = np.asarray(actions)
        if actions.shape != self.action_space.shape:
            raise ValueError(f"actions must be {self.action_space.shape}, not {actions.shape}")
        live = ~(self.terminated | self.truncated)
        before = self.state.copy()
        self.control[:] = actions
        shares = np.array_split(np.flatnonzero(live), len(self.data))
        list(self.pool.map(self.simulate, self.data, shares))

        bad = diverged(self.state[:, : -self.model.nu])
        self.state[bad] = before[bad]
        v = (self.qpos[:, 0] - before[:, 0]) / self.dt
        goals = np.repeat(self.goals, self.episodes_per_goal)
        reward = np.where(live, self.family.reward(goals, v, actions), 0.0)
        self.elapsed += live
        self.terminated |= live & (bad | self.family.fallen(self.qpos))
        self.truncated |= live & (self.elapsed >= self.horizon)
        obs = self.family.observe(self.qpos, self.qvel)
        return obs, reward, self.terminated.copy(), self.truncated.copy(), {"x_velocity": v}

    def close_extras(self, **kwargs) -> None:
        self.pool.shutdown()
