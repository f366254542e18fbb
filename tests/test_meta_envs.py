"""The task families against Gymnasium's own physics and against their table of rewards."""

import warnings

import gymnasium as gym
import mujoco
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from meta_envs import FAMILIES, MetaVectorEnv, sample_goals

GOALS = {env_id: [-1.0, 1.0] if "FwdBack" in env_id else [2.5, 0.7] for env_id in FAMILIES}
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*out of date")


@pytest.mark.parametrize("env_id", FAMILIES)
def test_steps_as_gymnasiums_own_physics_and_as_the_single_environment(env_id):
    envs = MetaVectorEnv(env_id, GOALS[env_id], episodes_per_goal=3, num_threads=2)
    envs.reset(seed=3)
    slot, ant = 4, "Ant" in env_id
    own = gym.make("Ant-v4" if ant else "HalfCheetah-v4").unwrapped
    single = gym.make(env_id, goal=GOALS[env_id][1])
    for env in (own, single):
        env.reset(seed=0)
        env.unwrapped.set_state(envs.qpos[slot].copy(), envs.qvel[slot].copy())
    rng = np.random.default_rng(0)
    for _ in range(200):
        actions = rng.uniform(-1, 1, envs.action_space.shape)
        actions *= 0.3 if ant else 1.5  # an ant stays on its legs; ±1 are the bounds
        obs, reward, terminated, truncated, _ = envs.step(actions)
        own.step(actions[slot])
        np.testing.assert_allclose(envs.qpos[slot], own.data.qpos, rtol=0, atol=1e-10)
        np.testing.assert_allclose(envs.qvel[slot], own.data.qvel, rtol=0, atol=1e-10)
        one = single.step(actions[slot])
        np.testing.assert_array_equal(obs[slot], one[0])
        assert (reward[slot], terminated[slot], truncated[slot]) == one[1:4]
    assert truncated[slot] and not terminated[slot]


@pytest.mark.parametrize("env_id", FAMILIES)
def test_rewards_and_observations_are_those_of_the_table(env_id):
    """Also after other goals are set; actions beyond ±1 are clamped, but charged in full."""
    envs = MetaVectorEnv(env_id, GOALS[env_id], episodes_per_goal=2)
    envs.reset(seed=5)
    rng = np.random.default_rng(0)
    for step in range(10):
        goals = GOALS[env_id] if step < 5 else GOALS[env_id][::-1]
        envs.set_goals(goals)
        actions, x = rng.uniform(-1.5, 1.5, envs.action_space.shape), envs.qpos[:, 0].copy()
        obs, reward, *_ = envs.step(actions)
        for slot, goal in enumerate(np.repeat(goals, 2)):
            v, c2 = (envs.qpos[slot, 0] - x[slot]) / 0.05, sum(c**2 for c in actions[slot])
            expected = {
                "HalfCheetahFwdBack-v0": goal * v - 0.05 * c2,
                "AntFwdBack-v0": goal * v - 0.005 * c2 + 0.05,
                "HalfCheetahVel-v0": -abs(v - goal) - 0.05 * c2,
                "AntVel-v0": 1 - abs(v - goal) - 0.005 * c2 + 0.05,
                "HalfCheetahVelMedium-v0": -abs(v - goal) - 0.05 * c2,
            }[env_id]
            assert reward[slot] == pytest.approx(expected, abs=1e-12)
            data = mujoco.MjData(envs.model)
            data.qpos[:], data.qvel[:] = envs.qpos[slot], envs.qvel[slot]
            mujoco.mj_forward(envs.model, data)
            state = [*data.qpos[2:], *data.qvel]
            if "Cheetah" in env_id:
                state = [*data.qpos[1:], *data.qvel, *data.body("torso").xpos]
            np.testing.assert_allclose(obs[slot], state, atol=1e-12)


@pytest.mark.parametrize("z", [-3.0, 1.2])
def test_an_ant_off_its_legs_ends_its_slot_alone(z):
    envs = MetaVectorEnv("AntVel-v0", [2.5, 0.7], 2)
    envs.reset(seed=0)
    envs.qpos[1, 2], still = z, np.zeros(envs.action_space.shape)
    envs.step(still)
    before = envs.qpos.copy()
    _, reward, terminated, truncated, _ = envs.step(still)
    assert terminated.tolist() == [False, True, False, False] and not truncated.any()
    assert (envs.qpos == before).all(-1).tolist() == [False, True, False, False]
    assert reward[1] == 0


@pytest.mark.parametrize("env_id", ["HalfCheetahVel-v0", "AntFwdBack-v0"])
def test_a_simulation_that_diverges_terminates_that_slot_alone(env_id, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MuJoCo writes a log of such things
    envs = MetaVectorEnv(env_id, GOALS[env_id], 2)
    envs.reset(seed=0)
    envs.qvel[2] = 1e9
    for _ in range(5):
        obs, reward, terminated, *_ = envs.step(np.zeros(envs.action_space.shape))
        assert np.isfinite(obs).all() and np.isfinite(reward).all()
        assert terminated.tolist() == [False, False, True, False]


def test_reset_noise_is_that_of_the_table_and_differs_by_seed_slot_and_episode():
    envs = MetaVectorEnv("HalfCheetahVel-v0", [1.0], 20_000)
    one, two, again, later = (envs.reset(seed=seed)[0] for seed in (1, 2, 1, None))
    np.testing.assert_array_equal(one, again)
    assert len(np.unique([*one, *two, *later], axis=0)) == 60_000
    offset = envs.qpos - envs.model.qpos0
    assert abs(offset).max() <= 0.1 and offset.std() == pytest.approx(0.1 / 3**0.5, rel=0.01)
    assert envs.qvel.std() == pytest.approx(0.1, rel=0.01)
    assert abs(envs.qvel).max() > 0.4  # normal


def test_a_mask_resets_these_slots_alone():
    envs = MetaVectorEnv("HalfCheetahVel-v0", [1.0], 4, horizon=3)
    envs.reset(seed=0)
    for _ in range(3):
        *_, truncated, _ = envs.step(np.ones((4, 6)))
    assert truncated.all()
    before, mask = envs.state.copy(), np.array([False, True, False, True])
    envs.reset(options={"reset_mask": mask})
    np.testing.assert_array_equal(envs.state[~mask], before[~mask])
    assert (envs.qpos[mask] != before[mask, :9]).any(-1).all() and (envs.warmstart[mask] == 0).all()
    *_, truncated, _ = envs.step(np.ones((4, 6)))
    assert truncated.tolist() == [True, False, True, False]


@pytest.mark.parametrize("env_id", ["HalfCheetahVel-v0", "AntFwdBack-v0"])
def test_the_registered_environments_pass_gymnasiums_checker(env_id):
    env = gym.make(env_id, goal=GOALS[env_id][0])
    with warnings.catch_warnings(action="error"):
        warnings.filterwarnings("ignore", ".*Box observation space (min|max)imum value")
        check_env(env.unwrapped, skip_render_check=True)
    assert env.spec.max_episode_steps == 200


@pytest.mark.parametrize("env_id", FAMILIES)
def test_goals_are_drawn_as_in_the_table(env_id):
    rng = np.random.default_rng(0)
    train, test = sample_goals(env_id, 1000, rng), sample_goals(env_id, 1000, rng, "test")
    if "FwdBack" in env_id:
        assert sorted(train) == sorted(test) == [-1.0] * 500 + [1.0] * 500
    else:
        ranges = ((0, 2.5), (2.5, 3)) if "Medium" in env_id else ((0, 3), (0, 3))
        for goals, (low, high) in zip((train, test), ranges):
            assert low <= goals.min() < low + 0.05 and high - 0.05 < goals.max() <= high
            assert goals.mean() == pytest.approx((low + high) / 2, abs=0.1)
        assert not set(train) & set(test)
