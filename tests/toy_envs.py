"""Environments for the tests, `--env-id toy_envs:NAME`, and one that stands for MetaVectorEnv."""

import math
import random
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np

ACTIONS = gym.spaces.Box(np.float32([0, -3]), np.float32([5, 7]))


class Clock(gym.Env):
    """Counts its steps: observation (episode, step), reward 1 + action[0]; may break on purpose."""

    array = np.zeros(2, np.float32)  # returned as every observation, and changed in place
    action_space = ACTIONS
    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,))

    def __init__(self, terminate_after=None, bad_reward_at=None, bad_observation_at=None):
        self.terminate_after, self.episode, self.steps = terminate_after, 0, 0
        self.bad_reward_at, self.bad_observation_at = bad_reward_at, bad_observation_at

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.step_in_episode = self.episode + 1, 0
        self.array[:] = self.episode, 0
        return self.array, {}

    def step(self, action):
        assert self.action_space.contains(action) and action.dtype == self.action_space.dtype
        self.steps, self.step_in_episode = self.steps + 1, self.step_in_episode + 1
        self.array[:] = self.episode, self.step_in_episode
        if self.steps == self.bad_observation_at:
            self.array[0] = np.nan
        reward = np.inf if self.steps == self.bad_reward_at else 1.0 + action[0]
        return self.array, reward, self.step_in_episode == self.terminate_after, False, {}


class Typed(Clock):
    """Terminates; has observations, rewards and flags of other types than MuJoCo's."""

    def __init__(self, reward, obs="float32"):
        super().__init__(terminate_after=5)
        self.observation_space = gym.spaces.Box(0, 100, (2,), np.dtype(obs).type)
        self.array, self.reward = np.zeros(2, obs), reward

    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        reward = {
            "int": int,
            "bool": lambda reward: np.bool_(reward > 3),
            "array": lambda reward: np.array([reward]),
            "vector": lambda reward: np.array([reward, 0]),
            "text": str,
        }[self.reward](reward)
        return obs, reward, np.bool_(terminated), 0, info


class Diary(gym.Env):
    """Notes the seeds of its resets and all transitions, which are noise."""

    action_space = ACTIONS
    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,))

    def __init__(self):
        self.seeds, self.transitions = [], []

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.seeds.append(seed)
        self.obs = self.np_random.standard_normal(2, dtype=np.float32)
        return self.obs, {}

    def step(self, action):
        obs, self.obs = self.obs, self.np_random.standard_normal(2, dtype=np.float32)
        reward, terminated = self.np_random.standard_normal(), self.np_random.random() < 0.1
        episode = len(self.seeds)
        self.transitions.append((obs, action, reward, self.obs, terminated, episode))
        return self.obs, reward, terminated, False, {}


class Cart(gym.Env):
    """Is pushed to the origin and stopped there: observation (x, v), reward -x²."""

    action_space = gym.spaces.Box(-1, 1, (1,))
    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,))

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.v = self.np_random.uniform(-1, 1, 2)
        return np.float32([self.x, self.v]), {}

    def step(self, action):
        self.v += 0.4 * action[0]
        self.x += 0.4 * self.v
        return np.float32([self.x, self.v]), -(self.x**2), False, False, {}


class Broken(Clock):
    """Cannot be made."""

    def __init__(self):
        raise KeyError("gravity")


class Closing(Clock):
    """Says when it is closed; its observations have noise of the global generators."""

    def step(self, action):
        obs, *rest = super().step(action)
        return obs + np.float32(random.random() * np.random.random()), *rest

    def close(self):
        with Path("closed").open("a") as file:
            file.write("x")


class Spaces(Clock):
    """Has the actions it is told to have."""

    def __init__(self, action_space):
        super().__init__()
        self.action_space = action_space


class Image(Clock):
    """Shows images."""

    observation_space = gym.spaces.Box(0, 255, (8, 8, 3), np.uint8)


class PointMass:
    """Stands for `MetaVectorEnv`: x moves by 0.2 a, the reward is -(x - goal)².

    It may fall off at `edge`. `rollouts` has what happened since each reset.
    """

    single_observation_space = gym.spaces.Box(-np.inf, np.inf, (1,))
    single_action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, env_id, goals, episodes_per_goal, num_threads=1, horizon=20, edge=math.inf):
        self.goals, self.episodes_per_goal = np.asarray(goals, dtype=float), episodes_per_goal
        self.horizon, self.edge, self.num_envs = horizon, edge, len(goals) * episodes_per_goal
        self.x, self.returns = np.zeros((self.num_envs, 1)), np.zeros(self.num_envs)
        self.lengths, self.rollouts = np.full(self.num_envs, horizon), []

    def set_goals(self, goals):
        self.goals = goals

    def reset(self, *, seed, options=None):
        mask = (options or {}).get("reset_mask", np.ones(self.num_envs, bool))
        self.x[mask] = np.random.default_rng(seed).uniform(-0.1, 0.1, (mask.sum(), 1))
        self.returns, self.lengths = self.returns * ~mask, self.lengths * ~mask
        now = SimpleNamespace(seed=seed, mask=mask, goals=self.goals, obs=[self.x.copy()])
        now.actions, now.returns, now.lengths = [], self.returns, self.lengths
        self.rollouts.append(now)
        return self.x.copy(), {}

    def step(self, actions):
        assert abs(actions).max() <= 1
        live = (self.lengths < self.horizon) & (abs(self.x[:, 0]) < self.edge)
        self.x[live] += 0.2 * actions[live]
        self.lengths += live
        reward = live * -((self.x[:, 0] - np.repeat(self.goals, self.episodes_per_goal)) ** 2)
        self.returns += reward
        self.rollouts[-1].actions.append(actions)
        self.rollouts[-1].obs.append(self.x.copy())
        terminated = abs(self.x[:, 0]) >= self.edge
        return self.x.copy(), reward, terminated, self.lengths >= self.horizon, {}

    def close(self):
        pass


gym.register("group/Truncating-v0", Clock, max_episode_steps=5)
gym.register("Typed-v0", Typed, max_episode_steps=50)
gym.register("Broken-v0", Broken)
gym.register("Image-v0", Image)
gym.register("Closing-v0", Closing, max_episode_steps=5)
gym.register("Spaces-v0", Spaces)
gym.register("Clock-v0", Clock)
gym.register("Cart-v0", Cart, max_episode_steps=20)
gym.register("Diary-v0", Diary, max_episode_steps=10)
for name, bounds in {
    "Unbounded": (-np.inf, np.inf, (2,), np.float32),
    "Integer": (-3, 3, (2,), np.int32),
    "Constant": (np.float32([-1, 1]), np.float32([1, 1]), (2,), np.float32),
    "Huge": (-2e38, 2e38, (2,), np.float32),
}.items():
    gym.register(f"{name}-v0", Spaces, kwargs={"action_space": gym.spaces.Box(*bounds)})
