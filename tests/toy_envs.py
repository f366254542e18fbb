"""Environments for the tests, `--env-id toy_envs:NAME`."""

import gymnasium as gym
import numpy as np


class Clock(gym.Env):
    """Counts its steps: observation (episode, step), reward 1 + action; may break on purpose."""

    action_space = gym.spaces.Box(np.float32([-2, 0]), np.float32([2, 10]))
    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,))

    def __init__(self, terminate_after=None, nan_reward_at=None, nan_obs_at=None, render_mode=None):
        self.terminate_after, self.episode, self.steps = terminate_after, 0, 0
        self.nan_reward_at, self.nan_obs_at = nan_reward_at, nan_obs_at

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.step_in_episode = self.episode + 1, 0
        return np.float32([self.episode, 0]), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.steps, self.step_in_episode = self.steps + 1, self.step_in_episode + 1
        obs = np.float32([self.episode, self.step_in_episode])
        reward = 1.0 + action[0]
        if self.steps == self.nan_obs_at:
            obs[0] = np.nan
        if self.steps == self.nan_reward_at:
            reward = np.inf
        return obs, reward, self.step_in_episode == self.terminate_after, False, {}


class Spaces(Clock):
    """Never steps: has the spaces it is told to have."""

    def __init__(self, observation_space=None, action_space=None, render_mode=None):
        box = gym.spaces.Box(-1, 1, (2,))
        self.observation_space = observation_space or box
        self.action_space = action_space or box


BOX, IMAGE = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Box(0, 255, (8, 8, 3), np.uint8)
gym.register("Truncating-v0", Clock, max_episode_steps=5)
gym.register("Terminating-v0", Clock, kwargs={"terminate_after": 5}, max_episode_steps=50)
gym.register("Dict-v0", Spaces, kwargs={"observation_space": gym.spaces.Dict({"a": BOX})})
gym.register("Image-v0", Spaces, kwargs={"observation_space": IMAGE})
unbounded = gym.spaces.Box(-np.inf, np.inf, (2,))
gym.register("Unbounded-v0", Spaces, kwargs={"action_space": unbounded})
