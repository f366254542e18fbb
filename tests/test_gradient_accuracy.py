"""Gradient accuracy (Fig. 3): the estimator on a linear-quadratic regulator, and the script."""

import itertools
import json
from pathlib import Path

import gradient_accuracy as ga
import numpy as np
import pandas as pd
import plot
import pytest
import torch
from helpers import CRITICS, ROOT, assert_refused, files
from scipy.linalg import solve_discrete_lyapunov

import sac_hyper
import td3_hyper

SCRIPT = ROOT / "analysis" / "gradient_accuracy.py"
SMALL = ["--num-states", 2, "--num-actions", 6, "--out"]
TABLE, PICTURE = Path("out/gradient_accuracy.csv"), Path("out/gradient_accuracy.png")

# A linear-quadratic regulator: s' = A s + B a + noise, r = -(sᵀ Q s + aᵀ R a), a = -K s. K is not
# optimal, so that the gradient is not 0.
GAMMA = 0.95
A = np.array([[0.9, 0.3, 0.0, 0.1], [-0.3, 0.9, 0.1, 0.0], [0.0, 0.1, 0.8, 0.2], [0.1, 0, -0.2, 1]])
B = np.array([[0.1, 0.0, 0.3], [0.3, 0.1, 0.0], [0.0, 0.3, 0.1], [0.2, 0.2, 0.2]])
Q, R, K = np.diag([1.0, 2.0, 0.5, 1.0]), 0.1 * np.eye(3), 0.3 * B.T
M = A - B @ K  # s' = M s under the policy
P = solve_discrete_lyapunov(GAMMA**0.5 * M.T, Q + K.T @ R @ K)  # V(s) = -sᵀ P s


class Regulator:
    """The regulator, from state s, as discounted_returns() and sample_states() use environments."""

    def __init__(self, s=None, limit=np.inf, terminate=False, noise=0.0):
        self.s, self.limit, self.terminate, self.noise = s, limit, terminate, noise
        self.steps, self.rng = 0, np.random.default_rng()

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


def held_q(s, action, hold):
    """Closed form of Σ_{k<hold} γ^k r(s_k, a) + γ^hold V(s_hold)"""
    total = 0.0
    for k in range(hold):
        total -= GAMMA**k * (s @ Q @ s + action @ R @ action)
        s = A @ s + B @ action
    return total - GAMMA**hold * (s @ P @ s)


def test_an_offset_does_not_move_the_slope():
    rng = np.random.default_rng(0)
    actions, slope = 3 + rng.standard_normal((15, 3)), np.array([1.0, -2.0, 0.5])
    np.testing.assert_allclose(ga.estimate_gradient(actions, actions @ slope + 1e4), slope)


@pytest.mark.parametrize("terminate", [False, True])
def test_a_rollout_cut_by_time_is_bootstrapped_unless_it_terminated(terminate):
    """With the true V after the cut, the closed form must come out, whatever the time limit."""
    s, limits, hold = np.array([8.0, -10.0, 2.0, -2.0]), [1, 2, 3, 4, 17, 60], 3
    actions = np.random.default_rng(0).standard_normal((len(limits), 3))
    envs = [Regulator(s, limit, terminate) for limit in limits]
    returns = ga.discounted_returns(envs, s, actions, policy, value, GAMMA, hold)
    expected = np.array([held_q(s, a, min(hold, limit)) for a, limit in zip(actions, limits)])
    if terminate:  # worth nothing more, also where time is up at that very step
        expected -= [GAMMA**limit * value(env.s[None])[0] for env, limit in zip(envs, limits)]
    np.testing.assert_allclose(returns, expected, rtol=1e-9)


def test_states_are_drawn_from_the_policys_own_distribution():
    """Under noise the regulator's state is normal, with a covariance known at every time step."""
    limit, episode, covariances = 20, 4, [np.eye(4)]
    for _ in range(episode - 1):
        covariances.append(M @ covariances[-1] @ M.T + np.eye(4))
    envs = [Regulator(limit=episode, noise=1.0) for _ in range(1500)]
    obs = ga.sample_states(envs, policy, np.random.default_rng(0), limit)
    assert all(np.array_equal(env.s, s) for env, s in zip(envs, obs))
    expected = np.mean(covariances, 0)
    assert np.linalg.norm(obs.T @ obs / 1500 - expected) < 0.1 * np.linalg.norm(expected)


def make_ant(steps):
    """An environment whose time is up after 40 steps, some random steps from a reset."""
    env = td3_hyper.make_env(td3_hyper.Args(env_id="Ant-v4", env_kwargs={"max_episode_steps": 40}))
    env.reset(seed=steps)
    env.action_space.seed(steps)
    for _ in range(steps):
        env.step(env.action_space.sample())
    return env


def test_a_copy_steps_bit_for_bit_like_the_original_which_its_check_leaves_alone():
    source, reference, target, *others = [make_ant(steps) for steps in (20, 20, 3, 3, 7)]
    ga.check_copy(source, *others, np.zeros(8, np.float32))
    ga.copy_state(source, [target])
    for _ in range(20):
        action = reference.action_space.sample()
        (obs, *rest, _), (other_obs, *other_rest, _) = reference.step(action), target.step(action)
        assert np.array_equal(obs, other_obs) and rest == other_rest
    assert rest[-1]  # time is up


def make_critic(q) -> torch.nn.Module:
    """Q(s, a) = q(a)"""
    critic = torch.nn.Module()
    critic.forward = lambda obs, action: q(action)
    return critic


def test_critic_gradient_and_bootstrap_are_taken_at_the_policys_action():
    """The gradient of the first critic, and the lower target critic."""
    args = td3_hyper.Args(critic="mlp-small", device="cpu")
    agent = td3_hyper.Agent(11, 3, args)
    for critics, peak in ((agent.critics, 2), (agent.target_critics, 0.2)):
        critics[0] = make_critic(lambda action, p=peak: -(action - p).square().sum(-1))
        critics[1] = make_critic(lambda action, p=peak: -(action + p).square().sum(-1))
    torch.nn.init.zeros_(agent.target_actor.output.weight)
    obs = np.random.default_rng(0).standard_normal((50, 11), dtype=np.float32) * 9
    a = td3_hyper.act(agent.actor, obs, "cpu")
    np.testing.assert_allclose(ga.critic_gradient(agent, args, obs), 2 * (2 - a), rtol=1e-5)
    expected = np.minimum(-((a - 0.2) ** 2).sum(1), -((a + 0.2) ** 2).sum(1))
    np.testing.assert_allclose(ga.target_value(agent, args, obs), expected, rtol=1e-5)


def test_the_columns_of_a_state_by_hand():
    a = np.array([0.0, 0.75**0.5])  # 1 - π² is 1 and 1/4
    critic, true, second = np.array([[3.0, 4.0], [2.0, 0.0], [2.0, 2.0]])
    row = ga.compare(a, critic, true, second)
    assert row["cosine_similarity"] == pytest.approx(0.6)
    assert row["similarity_weighted"] == pytest.approx(3 / 10**0.5)  # (3, 1) and (2, 0)
    assert row["similarity_of_two"] == pytest.approx(0.5**0.5)
    assert np.isnan(ga.compare(a, critic, true)["similarity_of_two"])


def test_without_noise_the_exact_critic_and_the_second_estimate_agree(monkeypatch):
    """measure() where a return is slope · a."""
    drawn, slope = [], np.float32([0.6, 0.8, 0.0])

    def returns(envs, obs, actions, policy, value, gamma, hold):
        assert (gamma, hold) == (0.9, 4)
        drawn.append(actions)
        return actions @ slope

    monkeypatch.setattr(ga, "discounted_returns", returns)
    run_args = td3_hyper.Args(critic="mlp-small", device="cpu", gamma=0.9)
    agent = td3_hyper.Agent(11, 3, run_args)
    agent.critics[0] = make_critic(lambda action: action @ torch.from_numpy(slope))
    agent.actor.output.weight.data.zero_()
    agent.actor.output.bias.data[:] = torch.atanh(torch.tensor([0.5, 0.96, -0.96]))
    args = ga.Args((Path(),), num_states=20, num_actions=60, hold=4, repeat=True)
    envs = ga.make_envs(run_args, 20 + 60)
    table = pd.DataFrame(ga.measure(agent, run_args, envs, args, step=0))
    np.testing.assert_allclose(table[ga.SIMILARITIES], 1, rtol=1e-5)
    np.testing.assert_allclose(table.saturated, 2 / 3)
    actions = np.array(drawn)
    assert actions.shape == (2 * 20, 60, 3) and (abs(actions) <= 1).all()
    assert len(np.unique(actions[..., 0])) > 2 * 20 * 60 / 2  # no estimate shares its actions
    assert 0.1 < (actions[..., 0] < 0.2).mean() < 0.2  # one standard deviation below 0.5


def make_run(run_dir: Path, *steps: int, script=td3_hyper, **arguments) -> Path:
    """What a run on a GPU leaves that has not learned: config.json and step_N.pt."""
    small = {"critic": "mlp-small", "device": "cpu", "env_kwargs": {"max_episode_steps": 30}}
    args = script.Args(**small | arguments)
    env = script.make_env(args)
    run_dir.mkdir(parents=True)
    saved = vars(args) | {"device": "cuda", "cuda_graph": True}
    (run_dir / "config.json").write_text(json.dumps({"args": saved}))
    for step in steps or (0,):
        torch.manual_seed(step)
        agent = script.Agent(env.observation_space.shape[0], env.action_space.shape[0], args)
        torch.save(agent.state_dict(), run_dir / f"step_{step}.pt")
    return run_dir


def test_a_row_for_each_state_and_it_goes_on_where_it_stopped(run_main):
    run_dir = make_run(Path("runs/td3_hyper/Hopper-v4/mlp-small/seed1"), 0, 6)
    options = ["--repeat", *SMALL]
    finished = run_main(SCRIPT, run_dir, *options, "whole")
    assert finished.code == 0 and finished.err == "", finished
    table = pd.read_csv(Path("whole", TABLE.name))
    assert list(zip(table.step, table.state)) == [(n, i) for n in (0, 6) for i in (0, 1)]
    assert set(zip(table.env_id, table.critic, table.seed)) == {("Hopper-v4", "mlp-small", 1)}
    assert (table[ga.SIMILARITIES].nunique() == 4).all()

    (run_dir / "step_0.pt").rename("step_0.pt")
    assert run_main(SCRIPT, run_dir, *options, "out").code == 0
    Path("step_0.pt").rename(run_dir / "step_0.pt")
    (run_dir / "step_6.pt").write_bytes(b"")  # what is in the table already is not read again
    assert run_main(SCRIPT, "runs", *options, "out").code == 0
    before = files(Path("out"))
    assert [*before.values()] == [*files(Path("whole")).values()]
    assert_refused(run_main(SCRIPT, run_dir, *options, "out", "--hold", 7), "another hold")
    assert files(Path("out")) == before


def test_the_critics_of_td3_and_sac(run_main):
    small = dict(primary_widths=(8, 16), dynamic_width=8)
    for critic in CRITICS:
        make_run(Path("td3", critic), critic=critic, **small)
    make_run(Path("sac"), script=sac_hyper, critic="sa-hyper", precision="bfloat16", **small)
    for script, critics in (("td3", CRITICS), ("sac", ["sa-hyper"])):
        assert run_main(SCRIPT, script, *SMALL, script).code == 0
        table = pd.read_csv(Path(script, TABLE.name))
        assert set(table.critic) == set(critics) and len(table) == 2 * len(critics)
        assert table.cosine_similarity.notna().all()


def test_tables_are_compared_on_the_checkpoints_that_all_runs_have(run_main):
    rows = []
    for critic, steps in (("mlp", (0, 5, 10)), ("sa-hyper", (0, 5, 10, 15))):
        for seed, step in itertools.product((1, 2), steps):
            cs = seed * step / 100 + 0.1 * (critic == "mlp") - 0.9 * (step in (0, 15))
            numbers = (step, 0, cs, cs / 2, 0.5, 0)
            rows.append(("Hopper-v4", critic, seed, *numbers, "old"))
    columns = ["env_id", "critic", "seed", "step", "state", *ga.SIMILARITIES, "saturated"]
    pd.DataFrame(rows, columns=[*columns, "exp_name"]).to_csv("old.csv", index=False)
    finished = run_main(SCRIPT, "old.csv", "--out", "out")
    assert finished.code == 0 and not TABLE.exists() and PICTURE.exists()
    assert "not all runs of a panel have steps [15]: left out" in finished.err
    rows = pd.read_csv("out/gradient_comparisons.csv").set_index("similarity")
    row = rows.loc["cosine_similarity"]  # means of steps 5 and 10 in seeds 1 and 2
    assert (row.a, row.b, row.runs_a, row["last"]) == ("sa-hyper", "mlp", 2, 10)
    assert [row.mean_a, row.mean_b] == pytest.approx([0.1125, 0.2125])
    assert row.low == pytest.approx(plot.compare([0.075, 0.15], [0.175, 0.25])["low"], rel=1e-5)


def test_bad_use_ends_with_a_message_and_writes_no_table(run_main):
    for name in ("good", "copies/a", "copies/b", "unsaved", "maml"):
        make_run(Path(name))
    make_run(Path("toy"), env_id="toy_envs:group/Truncating-v0")
    Path("unsaved/step_0.pt").unlink()
    Path("maml/config.json").write_text('{"args": {"model": "hyper"}}')
    assert_refused(run_main(SCRIPT, "maml"), "maml/config.json", "td3_hyper.py or sac_hyper.py")
    assert_refused(run_main(SCRIPT, "unsaved"), "unsaved has no step_N.pt", "--save-every")
    assert_refused(run_main(SCRIPT, "copies"), "copies/a", "copies/b", "are both")
    assert_refused(run_main(SCRIPT, "good", "toy"), "toy_envs:group/Truncating-v0", "MuJoCo")
    assert not any(Path().rglob("*.csv"))
