"""Gradient accuracy (Fig. 3): the estimator on a linear-quadratic regulator, and the script."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import mujoco
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, start
from test_run import assert_refused, files

sys.path.insert(0, str(ROOT / "analysis"))

import gradient_accuracy as ga  # noqa: E402

import sac_hyper  # noqa: E402
import td3_hyper  # noqa: E402
from hypernet import CRITICS  # noqa: E402

SCRIPT = ROOT / "analysis" / "gradient_accuracy.py"
TINY = ["--total-timesteps", 12, "--learning-starts", 10, "--save-every", 6, "--batch-size", 4]
TINY += ["--primary-widths", 8, "--dynamic-width", 8, "--eval-episodes", 1]
SMALL = ["--num-states", 2, "--num-actions", 6, "--out", "out"]
TABLE, PICTURE = Path("out/gradient_accuracy.csv"), Path("out/gradient_accuracy_Hopper-v4.png")

# A linear-quadratic regulator: s' = A s + B a + noise, r = -(sᵀ Q s + aᵀ R a), a = -K s. K is not
# optimal, so that the gradient is not 0.
GAMMA = 0.95
A = np.array([[0.9, 0.3, 0.0, 0.1], [-0.3, 0.9, 0.1, 0.0], [0.0, 0.1, 0.8, 0.2], [0.1, 0, -0.2, 1]])
B = np.array([[0.1, 0.0, 0.3], [0.3, 0.1, 0.0], [0.0, 0.3, 0.1], [0.2, 0.2, 0.2]])
Q, R, K = np.diag([1.0, 2.0, 0.5, 1.0]), 0.1 * np.eye(3), 0.3 * B.T
M = A - B @ K  # s' = M s under the policy


def solve(transition: np.ndarray, constant: np.ndarray) -> np.ndarray:
    """X with X = constant + transitionᵀ X transition."""
    kron = np.kron(transition.T, transition.T)
    return np.linalg.solve(np.eye(16) - kron, constant.ravel()).reshape(4, 4)


P = solve(GAMMA**0.5 * M, Q + K.T @ R @ K)  # V(s) = -sᵀ P s


class Regulator:
    """The regulator, from state s, as discounted_returns() and sample_states() use environments."""

    def __init__(self, s=None, limit=np.inf, terminate=False, noise=0.0, seed=0):
        self.s, self.limit, self.terminate, self.noise = s, limit, terminate, noise
        self.steps, self.rng = 0, np.random.default_rng(seed)

    def reset(self, seed=None):
        if seed is not None:
            self.rng = np.random.default_rng(seed)
        self.s, self.steps = self.noise * self.rng.standard_normal(4), 0
        return self.s, {}

    def step(self, action):
        reward = -(self.s @ Q @ self.s + action @ R @ action)
        self.s = A @ self.s + B @ action + self.noise * self.rng.standard_normal(4)
        self.steps += 1
        end = self.steps >= self.limit
        return self.s, reward, end and self.terminate, end, {}


def policy(obs):
    return -obs @ K.T


def value(obs):
    return -np.einsum("ni,ij,nj->n", obs, P, obs)


def held_q(s, action, hold=1, gamma=GAMMA):
    """Closed form of Σ_{k<hold} γ^k r(s_k, a) + γ^hold V(s_hold); Q(s, a) for hold=1."""
    total = 0.0
    for k in range(hold):
        total -= gamma**k * (s @ Q @ s + action @ R @ action)
        s = A @ s + B @ action
    return total - gamma**hold * (s @ P @ s)


def gradient(s, action, hold=1):
    """∂/∂a of that: it is quadratic, so central differences are exact."""
    units = np.eye(3)
    return np.array([held_q(s, action + e, hold) - held_q(s, action - e, hold) for e in units]) / 2


def draw_states(num: int) -> np.ndarray:
    return np.random.default_rng(3).standard_normal((num, 4)) * 4


def regulator_estimates(hold=1, noise=0.0):
    """States, estimated gradients and returns: 50 states of 15 rollouts, as the script makes them.

    Time cuts them after 20 steps.
    """
    rng, states = np.random.default_rng(0), draw_states(50)
    estimates, all_returns = [], []
    for i, s in enumerate(states):
        envs = [Regulator(s, limit=20, noise=noise, seed=(i, j)) for j in range(15)]
        actions = policy(s) + ga.STD * rng.standard_normal((15, 3))
        returns = ga.discounted_returns(envs, s, actions, policy, value, GAMMA, hold)
        estimates.append(ga.estimate_gradient(actions, returns))
        all_returns.append(returns)
    return states, np.array(estimates), np.array(all_returns)


def mean_similarity(a, b) -> float:
    return np.mean([ga.cosine_similarity(x, y) for x, y in zip(a, b)])


def gradients(states, hold=1):
    return [gradient(s, policy(s), hold) for s in states]


def test_the_regulators_closed_form_is_right():
    s, a = draw_states(1)[0], np.array([0.3, -0.2, 0.1])
    by_hand = -2 * R @ a - 2 * GAMMA * B.T @ P @ (A @ s + B @ a)
    np.testing.assert_allclose(gradient(s, a), by_hand, rtol=1e-8)
    np.testing.assert_allclose(value(s[None])[0], held_q(s, policy(s)), rtol=1e-8)  # Bellman


@pytest.mark.parametrize("hold", [1, 3])
def test_without_noise_the_estimate_is_the_regulators_gradient(hold):
    states, estimates, _ = regulator_estimates(hold)
    assert mean_similarity(estimates, gradients(states, hold)) > 0.99
    norms = np.linalg.norm(estimates, axis=1), np.linalg.norm(gradients(states, hold), axis=1)
    assert 0.9 < np.median(norms[0] / norms[1]) < 1.1


def test_holding_the_action_fits_something_close_to_the_gradient_of_q_but_not_that():
    states, estimates, _ = regulator_estimates(hold=3)
    assert 0.9 < mean_similarity(estimates, gradients(states)) < 0.98


def test_with_moderate_noise_the_estimate_is_close():
    """Noise in the dynamics that gives the returns half the spread that the actions give them."""
    _, _, clean = regulator_estimates()
    states, estimates, noisy = regulator_estimates(noise=0.03)
    spread = np.median((noisy - clean).std(1) / clean.std(1))
    assert 0.4 < spread < 0.8
    assert 0.9 < mean_similarity(estimates, gradients(states)) < 0.99


def test_random_directions_have_nothing_in_common_with_the_estimate():
    _, estimates, _ = regulator_estimates()
    rng = np.random.default_rng(5)
    similarities = [mean_similarity(estimates, rng.standard_normal((50, 3))) for _ in range(20)]
    assert abs(np.mean(similarities)) < 0.05  # of 1,000 directions, std 0.02


def test_an_offset_of_the_returns_or_of_the_actions_does_not_move_the_slope():
    rng = np.random.default_rng(0)
    actions, slope = 3 + rng.standard_normal((15, 3)), np.array([1.0, -2.0, 0.5])
    np.testing.assert_allclose(ga.estimate_gradient(actions, actions @ slope + 1e4), slope)


def test_returns_that_are_all_the_same_have_no_gradient():
    actions = np.random.default_rng(0).standard_normal((15, 3))
    estimate = ga.estimate_gradient(actions, np.full(15, 0.1 + 0.2))
    assert (estimate == 0).all()
    assert np.isnan(ga.cosine_similarity(estimate, np.ones(3)))


@pytest.mark.parametrize("hold", [1, 3])
def test_a_rollout_cut_by_time_is_bootstrapped_wherever_it_is_cut(hold):
    """With the true V after the cut, the closed form must come out, whatever the time limit."""
    s, limits = draw_states(1)[0], [1, 2, 3, 4, 17, 60]
    actions = np.random.default_rng(0).standard_normal((len(limits), 3))
    envs = [Regulator(s, limit) for limit in limits]
    returns = ga.discounted_returns(envs, s, actions, policy, value, GAMMA, hold)
    expected = [held_q(s, a, min(hold, limit)) for a, limit in zip(actions, limits)]
    np.testing.assert_allclose(returns, expected, rtol=1e-9)


def test_a_rollout_that_terminates_is_worth_nothing_more():
    """Also where time is up at that very step."""
    s = draw_states(1)[0]
    actions = np.random.default_rng(0).standard_normal((2, 3))
    envs = [Regulator(s, limit, terminate=True) for limit in (1, 2)]
    returns = ga.discounted_returns(envs, s, actions, policy, value, GAMMA, hold=1)
    rest = [GAMMA * value((A @ s + B @ actions[0])[None])[0]]
    rest += [GAMMA**2 * value((M @ (A @ s + B @ actions[1]))[None])[0]]
    expected = [held_q(s, a) - v for a, v in zip(actions, rest)]
    np.testing.assert_allclose(returns, expected, rtol=1e-9)


@pytest.mark.parametrize("episode", [np.inf, 4])
def test_states_are_drawn_from_the_policys_own_distribution(episode):
    """Under noise the regulator's state is normal, with a covariance known at every time step."""
    limit, covariances = 20, [np.eye(4)]
    for _ in range(limit):
        covariances.append(M @ covariances[-1] @ M.T + np.eye(4))
    expected = np.mean([covariances[int(n % episode)] for n in range(limit)], 0)
    envs = [Regulator(limit=episode, noise=1.0) for _ in range(1500)]
    obs = ga.sample_states(envs, policy, np.random.default_rng(0), limit)
    assert all(np.array_equal(env.s, s) for env, s in zip(envs, obs))
    assert np.linalg.norm(obs.T @ obs / 1500 - expected) < 0.1 * np.linalg.norm(expected)
    others = ga.sample_states(envs, lambda s: -2 * policy(s), np.random.default_rng(0), limit)
    assert np.linalg.norm(others.T @ others / 1500 - expected) > 0.2 * np.linalg.norm(expected)


MUJOCO = ["Hopper-v4", "Hopper-v5", "Walker2d-v4", "Ant-v4", "HalfCheetah-v4"]


@pytest.fixture
def pair():
    """Two environments whose time is up after 40 steps, 20 and 3 random steps from a reset."""

    def make(env_id):
        rng, envs = np.random.default_rng(0), []
        for steps in (20, 3):
            kwargs = '{"max_episode_steps": 40}'
            env = td3_hyper.make_env(td3_hyper.Args(env_id=env_id, env_kwargs=kwargs))
            env.reset(seed=steps)
            for _ in range(steps):
                env.step(rng.uniform(-1, 1, env.action_space.shape).astype(np.float32))
            envs.append(env)
        return envs

    return make


def assert_alike(a, b, steps: int) -> None:
    rng = np.random.default_rng(1)
    for _ in range(steps):
        action = rng.uniform(-1, 1, a.action_space.shape).astype(np.float32)
        (obs, *rest, _), (other_obs, *other_rest, _) = a.step(action), b.step(action)
        assert np.array_equal(obs, other_obs) and rest == other_rest
    assert rest[-1]  # time is up


@pytest.mark.parametrize("env_id", MUJOCO)
def test_a_copied_state_steps_like_the_original_bit_for_bit(env_id, pair):
    source, target = pair(env_id)
    ga.copy_state(source, target)
    assert_alike(source, target, 20)


def test_the_check_of_a_copy_leaves_all_copies_in_the_state(pair):
    source, first = pair("Ant-v4")
    reference, second = pair("Ant-v4")
    ga.copy_checked(source, [first, second], np.zeros(8, np.float32))
    assert_alike(reference, first, 20)
    reference, _ = pair("Ant-v4")
    assert_alike(reference, second, 20)


def test_a_state_that_is_not_copied_whole_is_noticed(pair, monkeypatch, capsys):
    """Positions and velocities, what Gymnasium's set_state sets, are not enough."""

    def copy_data(target, model, source):
        target.qpos[:], target.qvel[:] = source.qpos, source.qvel
        mujoco.mj_forward(model, target)

    monkeypatch.setattr(mujoco, "mj_copyData", copy_data)
    source, target = pair("Ant-v4")
    with pytest.raises(SystemExit, match="2"):
        ga.copy_checked(source, [target, target], np.zeros(8, np.float32))
    assert "does not step alike" in capsys.readouterr().err


class Paraboloid(torch.nn.Module):
    """Q(s, a) = offset - |a - peak|²"""

    def __init__(self, peak: float, offset: float = 0.0):
        super().__init__()
        self.peak, self.offset = peak, offset

    def forward(self, obs, action):
        return self.offset - (action - self.peak).square().sum(-1)


def test_the_first_critics_gradient_is_taken_at_the_policys_action():
    env = td3_hyper.make_env(td3_hyper.Args())
    agent = td3_hyper.Agent(11, env.action_space, td3_hyper.Args(critic="mlp-small"))
    agent.critics = torch.nn.ModuleList([Paraboloid(2.0), Paraboloid(-2.0)])
    obs = np.random.default_rng(0).standard_normal((5, 11))
    expected = 2 * (2 - td3_hyper.act(agent.actor, obs))
    np.testing.assert_allclose(ga.critic_gradient(agent, obs), expected, rtol=1e-5)


def test_the_bootstrap_is_the_lower_target_critic_at_the_policys_action():
    env = td3_hyper.make_env(td3_hyper.Args())
    agent = td3_hyper.Agent(11, env.action_space, td3_hyper.Args(critic="mlp-small"))
    for critics, offset in ((agent.critics, 99.0), (agent.target_critics, 0.0)):
        critics[0], critics[1] = Paraboloid(0.2, offset), Paraboloid(-0.2, offset)
    torch.nn.init.zeros_(agent.target_actor.net[4].weight)
    obs = np.random.default_rng(0).standard_normal((50, 11)) * 9
    a = td3_hyper.act(agent.actor, obs)
    expected = np.minimum(-((a - 0.2) ** 2).sum(1), -((a + 0.2) ** 2).sum(1))
    np.testing.assert_allclose(ga.target_value(agent, obs), expected, rtol=1e-5)


@pytest.mark.parametrize("std", [0.3, 30])
def test_actions_are_drawn_around_the_policys_in_half_widths_and_clipped(monkeypatch, std):
    args = td3_hyper.Args(env_id="InvertedPendulum-v4")  # actions in [-3, 3]
    envs = [td3_hyper.make_env(args) for _ in range(201)]
    for env in envs:
        env.reset()
    agent = td3_hyper.Agent(4, envs[0].action_space, td3_hyper.Args(critic="mlp-small"))
    agent.actor.net[4].weight.data.zero_()
    agent.actor.net[4].bias.data.zero_()
    calls = []

    def returns(envs, obs, actions, *others):
        calls.append((actions, *others))
        return actions[:, 0]

    monkeypatch.setattr(ga, "discounted_returns", returns)
    monkeypatch.setattr(ga, "STD", std)
    ga.measure(agent, 0.9, envs[:1], envs[1:], 4, np.random.default_rng(0))
    ((actions, _, _, gamma, hold),) = calls
    assert (gamma, hold) == (0.9, 4) and actions.shape == (200, 1) and abs(actions).max() <= 3
    if std == 0.3:
        assert abs(actions.mean()) < 0.2 and abs(actions.std() - 0.9) < 0.15
    else:
        assert (abs(actions) == 3).mean() > 0.8


def test_the_picture_shows_the_four_panels_of_fig_3(monkeypatch, tmp_path):
    table = pd.DataFrame(
        [
            ("sa-hyper", 1, 0, -1.0),
            ("sa-hyper", 2, 0, 0.5),
            ("sa-hyper", 1, 10, 0.5),
            ("sa-hyper", 2, 10, 1.0),
            ("mlp", 1, 0, np.nan),
            ("mlp", 1, 0, 0.25),
        ],
        columns=["critic", "seed", "step", "cosine_similarity"],
    )
    monkeypatch.setattr(ga.plt, "close", lambda figure: None)
    ga.plot("Hopper-v4", table, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    threshold, quarter, three_quarters, mean = ga.plt.gcf().axes
    labels = [line.get_label() for line in threshold.lines]
    assert labels == ["mlp (1)", "sa-hyper (2)"]
    tau, share = threshold.lines[1].get_data()
    assert [share[tau == t].item() for t in (0, 0.25, 0.5, 1)] == [75, 75, 25, 0]
    assert list(threshold.lines[0].get_ydata()[[0, 50]]) == [50, 0]  # no gradient: not above
    assert list(quarter.lines[1].get_ydata()) == [50, 100]
    assert list(three_quarters.lines[1].get_ydata()) == [0, 50]
    assert list(mean.lines[1].get_xdata()) == [0, 10]
    assert list(mean.lines[1].get_ydata()) == [-0.25, 0.75]
    assert quarter.lines[0].get_ydata() == [0] and mean.lines[0].get_ydata() == [0.25]
    low, high = mean.collections[1].get_datalim(mean.transData).intervaly
    assert (low, high) == (-0.625, 0.875)
    colours = [line.get_color() for line in threshold.lines]
    assert colours == [ga.COLOURS["mlp"], ga.COLOURS["sa-hyper"]]
    ga.plt.close("all")


def test_every_critic_has_a_colour_of_its_own():
    assert set(ga.COLOURS) == set(CRITICS) and len(set(ga.COLOURS.values())) == len(CRITICS)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run of td3_hyper.py with step_0.pt, step_6.pt and step_12.pt."""
    folder = tmp_path_factory.mktemp("trained")
    process = start(ROOT / "td3_hyper.py", *TINY, cwd=folder)
    _, err = process.communicate()
    assert process.returncode == 0, err
    return folder / "runs/td3_hyper/Hopper-v4/sa-hyper/seed1"


@pytest.fixture
def run_dir(trained, tmp_path) -> Path:
    """A copy of that run in the working directory."""
    shutil.copytree(trained, tmp_path / "runs/td3_hyper/Hopper-v4/sa-hyper/seed1")
    return Path("runs/td3_hyper/Hopper-v4/sa-hyper/seed1")


def make_run(run_dir: Path, **arguments) -> Path:
    """What td3_hyper.py leaves of a run that has not learned: config.json and step_0.pt."""
    args = td3_hyper.Args(**{"critic": "mlp-small"} | arguments)
    env = td3_hyper.make_env(args)
    run_dir.mkdir(parents=True)
    (run_dir / "config.json").write_text(json.dumps({"args": dataclasses.asdict(args)}))
    torch.manual_seed(0)
    agent = td3_hyper.Agent(env.observation_space.shape[0], env.action_space, args)
    torch.save(agent.state_dict(), run_dir / "step_0.pt")
    return run_dir


def test_one_row_a_state_and_a_picture(run_main, run_dir):
    finished = run_main(SCRIPT, run_dir, *SMALL)
    assert finished.code == 0 and finished.err == "", finished
    assert [f"step {n}:" in finished.out for n in (0, 6, 12)] == [True] * 3
    table = pd.read_csv(TABLE)
    assert list(table.columns) == ga.COLUMNS
    rows = [(n, i) for n in (0, 6, 12) for i in (0, 1)]
    assert list(zip(table.step, table.state)) == rows
    assert set(zip(table.env_id, table.critic, table.seed)) == {("Hopper-v4", "sa-hyper", 1)}
    cs = table.cosine_similarity
    error = np.std(cs.to_numpy().reshape(3, 2).mean(1), ddof=1) / np.sqrt(3)
    numbers = [float(n) for n in finished.out.split("sa-hyper ")[-1].split()[:5]]
    assert numbers == pytest.approx(
        [6, (cs > 0.25).mean(), (cs > 0.75).mean(), cs.mean(), error], abs=1e-3
    )
    assert table.cosine_similarity.between(-1, 1).all() and table.cosine_similarity.nunique() == 6
    assert (table.norm_true > 0).all() and (table.norm_critic > 0).all()
    assert PICTURE.read_bytes().startswith(b"\x89PNG")


def test_it_resumes_where_it_stopped_and_ends_like_one_that_never_stopped(
    run_main, run_dir, monkeypatch
):
    assert run_main(SCRIPT, run_dir, *SMALL[:-1], "whole").code == 0
    (run_dir / "step_0.pt").rename("step_0.pt")  # comes later, and goes first in the table
    write, written = td3_hyper.write, []

    def write_once(file, content):
        if written:
            raise SystemExit(9)
        written.append(file)
        write(file, content)

    with monkeypatch.context() as patch:
        patch.setattr(td3_hyper, "write", write_once)
        assert run_main(SCRIPT, run_dir, *SMALL).code == 9
    assert len(pd.read_csv(TABLE)) == 2
    Path("step_0.pt").rename(run_dir / "step_0.pt")
    finished = run_main(SCRIPT, "runs", *SMALL)
    assert finished.code == 0 and [f"step {n}:" in finished.out for n in (0, 6, 12)] == [1, 0, 1]
    assert TABLE.read_bytes() == Path("whole", TABLE.name).read_bytes()
    before = TABLE.read_bytes()
    finished = run_main(SCRIPT, run_dir.resolve(), *SMALL)
    assert "step 12:" not in finished.out and TABLE.read_bytes() == before


def test_a_table_of_other_settings_is_refused_and_left_alone(run_main, run_dir):
    assert run_main(SCRIPT, run_dir, *SMALL).code == 0
    before = files(Path("out"))
    for option in ("--num-states", "--num-actions", "--hold"):
        name = option.removeprefix("--").replace("-", "_")
        assert_refused(run_main(SCRIPT, run_dir, *SMALL, option, 7), f"another {name} than 7")
    TABLE.write_text("a,b\n1,2\n")
    assert_refused(run_main(SCRIPT, run_dir, *SMALL), str(TABLE), "another --out")
    assert files(Path("out")).keys() == before.keys()
    assert TABLE.read_text() == "a,b\n1,2\n"


def test_each_option_changes_what_is_measured(run_main, run_dir):
    for step in (6, 12):
        (run_dir / f"step_{step}.pt").unlink()
    tables = []
    for i, option in enumerate([(), ("--num-states", 3), ("--num-actions", 7), ("--hold", 1)]):
        assert run_main(SCRIPT, run_dir, *SMALL[:-1], i, *option).code == 0
        tables.append(pd.read_csv(Path(str(i), TABLE.name)))
    assert [len(table) for table in tables] == [2, 3, 2, 2]
    assert len({table.cosine_similarity[0] for table in tables}) == 4


def test_the_return_is_discounted_as_in_the_run(run_main):
    for i, gamma in enumerate((0.99, 0.5)):
        assert run_main(SCRIPT, make_run(Path(f"run{i}"), gamma=gamma), *SMALL[:-1], i).code == 0
    a, b = (pd.read_csv(Path(str(i), TABLE.name)) for i in (0, 1))
    assert (a.norm_critic == b.norm_critic).all() and (a.norm_true != b.norm_true).all()


def test_all_eight_critics(run_main):
    for critic in CRITICS:
        make_run(Path("runs", critic), critic=critic, primary_widths=(8, 16), dynamic_width=8)
    finished = run_main(SCRIPT, "runs", *SMALL)
    assert finished.code == 0, finished.err
    table = pd.read_csv(TABLE)
    assert set(table.critic) == set(CRITICS) and len(table) == 2 * len(CRITICS)
    assert table.cosine_similarity.notna().all()


def test_a_picture_for_each_environment_and_each_with_its_own_arguments(run_main):
    make_run(Path("runs/hopper"))
    kwargs = '{"max_episode_steps": 2}'
    make_run(Path("runs/pendulum"), env_id="InvertedPendulum-v4", env_kwargs=kwargs)
    finished = run_main(SCRIPT, "runs/hopper", "runs/pendulum", *SMALL)
    assert finished.code == 0 and "Warning" not in finished.err
    assert PICTURE.exists() and Path("out/gradient_accuracy_InvertedPendulum-v4.png").exists()
    table = pd.read_csv(TABLE).set_index("env_id")
    assert table.loc["InvertedPendulum-v4", "norm_true"].notna().all()


def bad_runs() -> None:
    make_run(Path("good"))
    make_run(Path("copies/a"))
    make_run(Path("copies/b"))
    make_run(Path("experiments/a"))
    make_run(Path("experiments/b"), exp_name="other", seed=2)
    make_run(Path("toy"), env_id="toy_envs:Truncating-v0")
    make_run(Path("endless"), env_kwargs='{"max_episode_steps": -1}')
    make_run(Path("humanoid"), env_id="Humanoid-v4")
    make_run(Path("gone"), env_id="Hopper-v4")
    config = Path("gone/config.json")
    config.write_text(config.read_text().replace("Hopper-v4", "Hopper-v2"))
    make_run(Path("unsaved"))
    Path("unsaved/step_0.pt").rename("unsaved/step_0.pt.tmp")
    make_run(Path("damaged"))
    Path("damaged/step_0.pt").write_bytes(b"PK")
    make_run(Path("networks"))
    config = Path("networks/config.json")
    config.write_text(config.read_text().replace("mlp-small", "mlp"))
    make_run(Path("sac"))
    args = dataclasses.asdict(sac_hyper.Args())
    Path("sac/config.json").write_text(json.dumps({"args": args}))
    make_run(Path("broken"))
    Path("broken/config.json").write_text("{")
    Path("empty").mkdir()


def test_bad_use_is_one_line_and_writes_nothing(run_main):
    bad_runs()
    before = files(Path())
    for args, words in [
        ([], ["runs"]),
        (["nowhere"], ["nowhere", "config.json"]),
        (["empty"], ["empty", "config.json"]),
        (["sac"], ["sac/config.json", "td3_hyper.py"]),
        (["broken"], ["broken/config.json"]),
        (["unsaved"], ["unsaved", "--save-every"]),
        (["toy"], ["toy_envs:Truncating-v0", "MuJoCo"]),
        (["endless"], ["no time limit"]),
        (["gone"], ["Hopper-v2", "Hopper-v4"]),
        (["humanoid"], ["--num-actions 15", "at least 19", "17"]),
        (["copies"], ["copies/a", "copies/b", "give one"]),
        (["experiments"], ["other, td3_hyper"]),
        (["good", "nowhere"], ["nowhere"]),
        (["good", "--num-states", "0"], ["--num-states 0", "at least 1"]),
        (["good", "--num-actions", "4"], ["--num-actions 4", "at least 5"]),
        (["good", "--hold", "0"], ["--hold 0", "at least 1"]),
        (["good", "--hold", "x"], ["--hold", "'x'"]),
        (["good", "--no-such-flag"], ["--no-such-flag"]),
        (["good", "--out", "/dev/null/out"], ["--out /dev/null/out", "cannot write"]),
    ]:
        assert_refused(run_main(SCRIPT, *args), *words)
    changed = {name for name in files(Path()) if name not in before}
    assert changed <= {Path("MUJOCO_LOG.TXT")} and not Path("plots").exists()


@pytest.mark.parametrize("name", ["damaged", "networks"])
def test_a_step_file_that_does_not_load_is_one_line(run_main, name):
    bad_runs()
    assert_refused(run_main(SCRIPT, name), f"{name}/step_0.pt does not hold the networks")
    assert not list(Path("plots").iterdir())
