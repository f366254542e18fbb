"""The updates of td3_hyper.py and sac_hyper.py: what they compute, and where gradients go."""

import copy

import pytest
import reference_td3_sac
import torch
from helpers import CRITICS, assert_close_in_bfloat16, assert_same_weights, graph_of
from torch.distributions import Independent, Normal, TransformedDistribution
from torch.distributions.transforms import TanhTransform

import pearl_hyper as pearl
import sac_hyper as sac
import td3_hyper as td3
from hypernet import ConcatCritic, Float32Linear, make_critic

SCRIPTS = pytest.mark.parametrize("script", [td3, sac], ids=["td3", "sac"])
RATES = {"critic": 0.03, "actor": 0.03, "alpha": 0.03}


def make_agent(script, critic: str, **options) -> tuple:
    torch.manual_seed(0)
    small = {"primary_widths": (8, 16), "dynamic_width": 8, "device": "cpu"}
    args = script.Args(critic=critic, **small | options)
    return script.Agent(3, 2, args), args


def make_batch(script, size: int = 10, seed: int = 1) -> tuple:
    """A batch, and the noise of the target's and of the actor's action."""
    torch.manual_seed(seed)
    obs, next_obs = torch.randn(2, size, 3)
    action, terminated = 2 * torch.rand(size, 2) - 1, (torch.rand(size) < 0.3).float()
    batch = script.Batch(obs, action, torch.randn(size), next_obs, terminated)
    return batch, torch.randn(2, size, 2)


def both_losses(script, agent, batch, noise, args) -> tuple[torch.Tensor, torch.Tensor]:
    """The critics' loss and the actor's."""
    loss, _ = script.critic_loss(agent, batch, noise[0], args)
    if script is td3:
        return loss, td3.actor_loss(agent, batch, args)
    return loss, sac.actor_loss(agent, batch, noise[1], args)[0]


@pytest.mark.parametrize("critic", ["mlp", "sa-hyper"])
@pytest.mark.parametrize(
    "script, options",
    [
        (td3, {"policy_frequency": 2, "target_noise": 0.3, "noise_clip": 0.4}),
        (sac, {}),
        (sac, {"autotune": False, "alpha": 0.3}),
        (sac, {"autotune": False, "alpha": 0.0}),
    ],
)
def test_updates_are_those_of_the_paper(script, options, critic):
    agent, args = make_agent(script, critic, gamma=0.9, tau=0.3, hyper_init="paper", **options)
    torch.nn.init.constant_(agent.actor.output.bias, 0.8)  # for actions to be clipped, too
    if script is td3:
        agent.target_actor.load_state_dict(agent.actor.state_dict())
    parts = {"critic": agent.critics.parameters(), "actor": agent.actor.parameters()}
    if script is sac:
        parts["alpha"] = [agent.log_alpha]
    optimizers = {name: torch.optim.SGD(p, RATES[name]) for name, p in parts.items()}
    before, batches = copy.deepcopy(agent), [make_batch(script, seed=i) for i in range(6)]
    reference = reference_td3_sac.td3 if script is td3 else reference_td3_sac.sac
    expected = reference(agent, batches, RATES, args)
    for i, (batch, (target_noise, actor_noise)) in enumerate(batches):
        q_value = agent.critics[0](batch.obs, batch.action).mean()
        losses = script.update_critics(agent, optimizers, batch, target_noise, args)
        assert losses["q_value"].item() == pytest.approx(q_value.item(), rel=1e-5)
        if script is sac:
            sac.update_actor_and_targets(agent, optimizers, batch, actor_noise, args)
        elif (i + 1) % args.policy_frequency == 0:
            td3.update_actor_and_targets(agent, optimizers, batch, args)
    assert_same_weights(agent, expected, before)
    assert not any(p.requires_grad or p.grad_fn for p in agent.targets)  # or memory would grow


@SCRIPTS
@pytest.mark.parametrize("critic", CRITICS)
def test_the_actors_gradient_flows_through_the_critic_to_the_actor_alone(script, critic):
    """And of a hypernetwork through the dynamic network only (Fig. 2c), however deep the other."""
    nodes = []
    for widths in ((8,), (8, 16, 32)):
        agent, args = make_agent(script, critic, primary_widths=widths)
        actor_loss = both_losses(script, agent, *make_batch(script), args)[1]
        parameters, size = graph_of(actor_loss)
        assert parameters == {id(p) for p in agent.actor.parameters()}
        assert all(p.requires_grad for p in agent.critics.parameters())
        nodes.append(size)
    assert (nodes[0] == nodes[1]) == (critic != "as-hyper")


@SCRIPTS
@pytest.mark.parametrize("critic", ["mlp", "d2rl", "as-hyper", "sa-hyper"])
def test_bfloat16_critics_have_the_losses_and_gradients_of_float32(script, critic):
    agent, args = make_agent(script, critic, primary_widths=(64, 128), dynamic_width=32)

    def losses(precision: str):
        args.precision = precision
        return both_losses(script, agent, *make_batch(script, 64), args)

    assert_close_in_bfloat16(losses, [agent.critics, agent.actor])


@pytest.mark.parametrize("name", [*CRITICS, "pearl"])
@torch.no_grad()
def test_a_q_near_1000_is_not_rounded_to_multiples_of_4_in_bfloat16(name):
    torch.manual_seed(0)
    obs = torch.randn(1, 11).expand(201, -1)
    action = torch.linspace(-1, 1, 201)[:, None] * torch.randn(3)
    mlp = ConcatCritic(pearl.MLP(14, 300, 1).layers)
    critic = mlp if name == "pearl" else make_critic(name, 11, 3)
    if name == "sa-hyper":  # W of the output layer makes it so large, else b
        bias = critic.hyper.output.to_W.bias.fill_(1)
        bias.fill_(1000 / critic(obs, action).mean())
    else:
        linears = [layer for layer in critic.modules() if isinstance(layer, Float32Linear)]
        last = critic.hyper.output.to_b if name == "as-hyper" else linears[-1]
        last.weight.mul_(20)
        last.bias.fill_(1000)
    args = [td3.Args(precision=p, device="cpu") for p in ("bfloat16", "float32")]
    values, expected = (len(td3.q_value(critic, obs, action, a).unique()) for a in args)
    assert values > 0.7 * expected > 70


def actor_with(mean, log_std) -> sac.Actor:
    """An actor whose distribution is the same in every state, in float64."""
    actor = sac.Actor(3, len(mean)).double()
    actor.output.weight.data.zero_()
    actor.output.bias.data = torch.tensor([*mean, *log_std]).double()
    return actor


def test_log_probability_of_sac_equals_torch_distributions_up_to_the_bounds_of_the_actions():
    normal = Normal(torch.tensor([0.3, -0.5]).double(), torch.tensor([0.7, 1.5]).double())
    actor = actor_with(normal.mean, normal.stddev.log())
    torch.manual_seed(0)
    noise = 12 * torch.randn(1000, 2).double()
    action, log_prob = actor.sample(torch.randn(1000, 3).double(), noise)
    tanh = TanhTransform(cache_size=1)  # the cache makes the inverse exact
    squashed = tanh(normal.mean + normal.stddev * noise)
    distribution = TransformedDistribution(Independent(normal, 1), [tanh])
    torch.testing.assert_close(action, squashed, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(log_prob, distribution.log_prob(squashed), rtol=1e-10, atol=1e-10)


def test_log_std_of_sac_is_bounded():
    _, log_std = actor_with([0, 0], [5, -50]).mean_and_log_std(torch.zeros(4, 3).double())
    assert (log_std == torch.tensor([2, -20])).all()


@SCRIPTS
def test_random_steps_are_those_of_td3s_paper_unless_given(script):
    expected = {"HalfCheetah-v4": 10_000, "Ant-v5": 10_000, "Hopper-v4": 1_000}
    expected |= {"Antenna-v0": 1_000, "Ant-Maze-v0": 1_000, "my/Ant-v0": 1_000}
    for env, steps in expected.items():
        assert script.Args(env_id=env, device="cpu").learning_starts == steps
        assert script.Args(env_id=env, device="cpu", learning_starts=0).learning_starts == 0
