"""The task families against Gymnasium's own physics and against their table of rewards."""

import math
import warnings

import gymnasium as gym
import mujoco
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from meta_envs import FAMILIES, MetaVectorEnv, sample_goals

CHEETAHS = [env_id for env_id in FAMILIES if "Cheetah" in env_id]
ANTS = [env_id for env_id in FAMILIES if "Ant" in env_id]
CONTROL_COST = {env_id: 0.05 for env_id in CHEETAHS} | {env_id: 0.005 for env_id in ANTS}
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*out of date")


def goals_of(env_id: str) -> list[float]:
    return [-1.0, 1.0] if "FwdBack" in env_id else [2.5, 0.7]


def gymnasium_env(env_id: str) -> gym.Env:
    gym.logger.min_level = gym.logger.ERROR
    return gym.make("Ant-v4" if "Ant" in env_id else "HalfCheetah-v4").unwrapped


def assert_at(env: gym.Env, envs: MetaVectorEnv, slot: int) -> None:
    """Put a single simulation where a slot of the batch is."""
    env.reset(seed=0)
    env.unwrapped.set_state(envs.qpos[slot].copy(), envs.qvel[slot].copy())


@pytest.mark.parametrize("env_id", FAMILIES)
def test_steps_as_gymnasiums_own_physics_and_as_the_single_environment(env_id):
    envs = MetaVectorEnv(env_id, goals_of(env_id), episodes_per_goal=3, num_threads=2)
    envs.reset(seed=3)
    slot = 4
    own, single = gymnasium_env(env_id), gym.make(env_id, goal=goals_of(env_id)[1])
    assert_at(own, envs, slot)
    assert_at(single, envs, slot)
    rng = np.random.default_rng(0)
    for _ in range(200):
        actions = rng.uniform(-1, 1, envs.action_space.shape)
        actions *= 0.3 if env_id in ANTS else 1.0  # so that it stays on its legs
        obs, reward, terminated, truncated, _ = envs.step(actions)
        own.step(actions[slot])
        np.testing.assert_allclose(envs.qpos[slot], own.data.qpos, rtol=0, atol=1e-10)
        np.testing.assert_allclose(envs.qvel[slot], own.data.qvel, rtol=0, atol=1e-10)
        one = single.step(actions[slot])
        np.testing.assert_array_equal(obs[slot], one[0])
        assert (reward[slot], terminated[slot], truncated[slot]) == one[1:4]
    assert truncated[slot] and not terminated[slot]


@pytest.mark.parametrize("env_id", ["HalfCheetahVel-v0", "AntVel-v0"])
def test_the_number_of_threads_changes_nothing(env_id):
    results = []
    for num_threads in (1, 2, 5):
        envs = MetaVectorEnv(env_id, goals_of(env_id), 4, num_threads)
        envs.reset(seed=1)
        rng = np.random.default_rng(0)
        steps = [envs.step(rng.uniform(-1, 1, envs.action_space.shape)) for _ in range(20)]
        results.append([np.concatenate([part.ravel() for part in step[:4]]) for step in steps])
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


@pytest.mark.parametrize("env_id", FAMILIES)
def test_rewards_and_observations_are_those_of_the_table(env_id):
    goals = goals_of(env_id)
    envs = MetaVectorEnv(env_id, goals, episodes_per_goal=2)
    obs, _ = envs.reset(seed=5)
    x = envs.qpos[:, 0].copy()
    rng = np.random.default_rng(0)
    for _ in range(10):
        actions = rng.uniform(-1, 1, envs.action_space.shape)
        obs, reward, *_ = envs.step(actions)
        for slot, goal in enumerate([goals[0], goals[0], goals[1], goals[1]]):
            v = (envs.qpos[slot, 0] - x[slot]) / 0.05
            cost = CONTROL_COST[env_id] * sum(c**2 for c in actions[slot])
            expected = {
                "HalfCheetahFwdBack-v0": goal * v - cost,
                "AntFwdBack-v0": goal * v - cost + 0.05,
                "HalfCheetahVel-v0": -abs(v - goal) - cost,
                "AntVel-v0": 1 - abs(v - goal) - cost + 0.05,
                "HalfCheetahVelMedium-v0": -abs(v - goal) - cost,
            }[env_id]
            assert reward[slot] == pytest.approx(expected, abs=1e-12)
            data = mujoco.MjData(envs.model)
            data.qpos[:], data.qvel[:] = envs.qpos[slot], envs.qvel[slot]
            mujoco.mj_forward(envs.model, data)
            if env_id in CHEETAHS:
                state = [*data.qpos[1:], *data.qvel, *data.body("torso").xpos]
                assert len(state) == 20
            else:
                state = [*data.qpos[2:], *data.qvel]
                assert len(state) == 27
            np.testing.assert_allclose(obs[slot], state, atol=1e-12)
        x = envs.qpos[:, 0].copy()


@pytest.mark.parametrize("env_id", ANTS)
@pytest.mark.parametrize("z", [-3.0, 1.2, math.nan])
def test_an_ant_off_its_legs_ends_its_slot_alone(env_id, z):
    envs = MetaVectorEnv(env_id, goals_of(env_id), 2)
    envs.reset(seed=0)
    for _ in range(3):
        envs.step(np.zeros(envs.action_space.shape))
    envs.qpos[1, 2] = z
    obs, reward, terminated, truncated, _ = envs.step(np.zeros(envs.action_space.shape))
    assert terminated.tolist() == [False, True, False, False] and not truncated.any()
    # It stays where it is, without reward, and the others go on.
    before = envs.state.copy()
    later, reward, terminated, _, _ = envs.step(np.zeros(envs.action_space.shape))
    assert terminated.tolist() == [False, True, False, False] and reward[1] == 0
    np.testing.assert_array_equal(envs.state[1, : envs.model.nq], before[1, : envs.model.nq])
    assert (envs.qpos[[0, 2, 3]] != before[[0, 2, 3], : envs.model.nq]).any(-1).all()


@pytest.mark.parametrize("env_id", CHEETAHS)
def test_a_cheetah_never_ends_early_whatever_it_does(env_id):
    envs = MetaVectorEnv(env_id, goals_of(env_id), 5, horizon=30)
    envs.reset(seed=0)
    rng = np.random.default_rng(0)
    for step in range(30):
        *_, terminated, truncated, _ = envs.step(
            np.sign(rng.uniform(-1, 1, envs.action_space.shape))
        )
        assert not terminated.any() and (truncated == (step == 29)).all()


@pytest.mark.parametrize("env_id", ["HalfCheetahVel-v0", "AntFwdBack-v0"])
def test_a_simulation_that_diverges_terminates_that_slot_alone(env_id, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MuJoCo writes a log of such things
    envs = MetaVectorEnv(env_id, goals_of(env_id), 2)
    twin = MetaVectorEnv(env_id, goals_of(env_id), 2)
    envs.reset(seed=0), twin.reset(seed=0)
    envs.qvel[2] = 1e9
    rng = np.random.default_rng(0)
    for _ in range(5):
        actions = 0.3 * rng.uniform(-1, 1, envs.action_space.shape)
        obs, reward, terminated, truncated, _ = envs.step(actions)
        others, other_reward, *_ = twin.step(actions)
        assert terminated.tolist() == [False, False, True, False]
        assert np.isfinite(obs).all() and np.isfinite(reward).all()
        np.testing.assert_array_equal(obs[[0, 1, 3]], others[[0, 1, 3]])
        np.testing.assert_array_equal(reward[[0, 1, 3]], other_reward[[0, 1, 3]])

    single = gym.make(env_id, goal=1.0)
    single.reset(seed=0)
    single.unwrapped.set_state(single.unwrapped.data.qpos.copy(), np.full(envs.model.nv, 1e9))
    obs, reward, terminated, *_ = single.step(np.zeros(envs.model.nu))
    assert terminated and np.isfinite(obs).all() and np.isfinite(reward)


def test_slots_are_goal_major():
    envs = MetaVectorEnv("HalfCheetahVel-v0", [0.5, 1.0, 2.0], episodes_per_goal=2)
    assert envs.num_envs == 6
    envs.reset(seed=0)
    envs.state[:] = envs.state[0]  # the same state and control: rewards differ by the goal alone
    _, reward, *_ = envs.step(np.zeros((6, 6)))
    v = (envs.qpos[0, 0] - envs.qpos[0, 0]) + reward[4] + 2.0  # of a cheetah slower than 2 m/s
    np.testing.assert_allclose(reward, -abs(v - np.array([0.5, 0.5, 1, 1, 2, 2])), atol=1e-12)
    envs.set_goals([2.0, 1.0, 0.5])
    envs.reset(seed=0)
    envs.state[:] = envs.state[0]
    _, reversed_reward, *_ = envs.step(np.zeros((6, 6)))
    np.testing.assert_allclose(reversed_reward, reward[::-1])


def test_actions_of_another_shape_are_refused():
    envs = MetaVectorEnv("HalfCheetahVel-v0", [1.0], 4)
    envs.reset(seed=0)
    for shape in ((6,), (4, 1), (4, 7), (3, 6)):
        with pytest.raises(ValueError, match=r"actions must be \(4, 6\)"):
            envs.step(np.zeros(shape))


def test_nothing_moves_before_the_first_reset():
    envs = MetaVectorEnv("HalfCheetahVel-v0", [1.0], 4)
    _, reward, _, truncated, _ = envs.step(np.ones((4, 6)))
    assert truncated.all() and (reward == 0).all() and (envs.qpos == 0).all()


def test_a_control_out_of_bounds_is_clamped_by_mujoco_and_charged_in_full():
    envs = MetaVectorEnv("HalfCheetahVel-v0", [1.0], 1)
    envs.reset(seed=0)
    single = gym.make("HalfCheetahVel-v0", goal=1.0)
    assert_at(single, envs, 0)
    actions = np.full((1, 6), 1e11)
    obs, reward, terminated, *_ = envs.step(actions)
    one = single.step(actions[0])
    np.testing.assert_array_equal(obs[0], one[0])
    assert reward[0] == one[1] < -1e20 and not terminated[0] and not one[2]


def test_seeds_and_slots_have_noise_of_their_own():
    def start(seed, **options):
        envs = MetaVectorEnv("AntVel-v0", [1.0, 2.0], 2)
        return envs.reset(seed=seed, **options)[0]

    np.testing.assert_array_equal(start(1), start(1))
    assert (start(1) != start(2)).any(-1).all()
    assert len(np.unique(start(1), axis=0)) == 4
    envs = MetaVectorEnv("AntVel-v0", [1.0, 2.0], 2)
    first, second = envs.reset(seed=1)[0], envs.reset()[0]
    assert (first != second).any(-1).all()


def test_reset_noise_is_that_of_the_table():
    envs = MetaVectorEnv("HalfCheetahVel-v0", [1.0], 20_000)
    envs.reset(seed=0)
    offset = envs.qpos - envs.model.qpos0
    assert abs(offset).max() <= 0.1 and offset.std() == pytest.approx(0.1 / 3**0.5, rel=0.01)
    assert envs.qvel.std() == pytest.approx(0.1, rel=0.01)
    assert abs((envs.qvel**4).mean() / (envs.qvel**2).mean() ** 2 - 3) < 0.1  # normal


def test_reset_mask_resets_these_slots_alone():
    envs = MetaVectorEnv("HalfCheetahVel-v0", [1.0], 4, horizon=3)
    assert envs.metadata["autoreset_mode"] == gym.vector.AutoresetMode.DISABLED
    envs.reset(seed=0)
    for _ in range(3):
        *_, truncated, _ = envs.step(np.ones((4, 6)))
    assert truncated.all()
    before = envs.state.copy()
    mask = np.array([False, True, False, True])
    obs, _ = envs.reset(options={"reset_mask": mask})
    np.testing.assert_array_equal(envs.state[~mask], before[~mask])
    assert (envs.qpos[mask] != before[mask, :9]).any(-1).all() and (envs.warmstart[mask] == 0).all()
    *_, truncated, _ = envs.step(np.ones((4, 6)))
    assert truncated.tolist() == [True, False, True, False]
    for bad in (np.ones(3, dtype=bool), np.ones(4), [True] * 4):
        with pytest.raises(ValueError, match="reset_mask"):
            envs.reset(options={"reset_mask": bad})


@pytest.mark.parametrize("env_id", FAMILIES)
def test_the_registered_environments_pass_gymnasiums_checker(env_id):
    env = gym.make(env_id, goal=goals_of(env_id)[0])
    with warnings.catch_warnings():
        warnings.filterwarnings("error")
        warnings.filterwarnings("ignore", ".*Box observation space (min|max)imum value")
        check_env(env.unwrapped, skip_render_check=True)
    assert env.spec.max_episode_steps == 200


@pytest.mark.parametrize("env_id", FAMILIES)
def test_goals_are_drawn_as_in_the_table(env_id):
    rng = np.random.default_rng(0)
    train = sample_goals(env_id, 1000, rng)
    test = sample_goals(env_id, 1000, rng, "test")
    if "FwdBack" in env_id:
        assert sorted(train) == sorted(test) == [-1.0] * 500 + [1.0] * 500
        assert sorted(sample_goals(env_id, 2, rng)) == [-1.0, 1.0]
    else:
        ranges = ((0, 2.5), (2.5, 3)) if "Medium" in env_id else ((0, 3), (0, 3))
        for goals, (low, high) in zip((train, test), ranges):
            assert low <= goals.min() < low + 0.05 and high - 0.05 < goals.max() <= high
            assert goals.mean() == pytest.approx((low + high) / 2, abs=0.1)
        assert not set(train) & set(test)
    again = sample_goals(env_id, 1000, np.random.default_rng(0))
    np.testing.assert_array_equal(train, again)


def test_a_goal_outside_the_family_is_allowed_but_warned_of():
    with pytest.warns(UserWarning, match=r"goal 3.5 is not in \[0, 3\]"):
        MetaVectorEnv("HalfCheetahVel-v0", [1.0, 3.5])
    with pytest.warns(UserWarning, match="goal 0.5 is not -1 or 1"):
        gym.make("AntFwdBack-v0", goal=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MetaVectorEnv("HalfCheetahVelMedium-v0", [0.0, 3.0])


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: MetaVectorEnv("HalfCheetahDir-v0", [1.0]), "HalfCheetahVelMedium-v0"),
        (lambda: sample_goals("Ant", 1, np.random.default_rng(0)), "AntFwdBack-v0"),
        (lambda: MetaVectorEnv("AntVel-v0", []), "one or more"),
        (lambda: MetaVectorEnv("AntVel-v0", [math.nan]), "finite"),
        (lambda: MetaVectorEnv("AntVel-v0", [1.0], 0), "episodes_per_goal must be at least 1"),
        (lambda: MetaVectorEnv("AntVel-v0", [1.0], 1, 0), "num_threads must be at least 1"),
        (lambda: MetaVectorEnv("AntVel-v0", [1.0], horizon=0), "horizon must be at least 1"),
        (lambda: sample_goals("AntVel-v0", 0, np.random.default_rng(0)), "at least 1"),
        (lambda: sample_goals("AntVel-v0", 1, np.random.default_rng(0), "tests"), "train or test"),
        (lambda: MetaVectorEnv("AntVel-v0", [1.0, 2.0]).set_goals([1.0]), "must be 2 goals"),
    ],
)
def test_bad_use_is_an_error_that_says_what_would_be_right(make, words):
    with pytest.raises(ValueError, match=words):
        make()
