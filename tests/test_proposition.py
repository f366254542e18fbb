"""Proposition 1: a policy step along a gradient that is accurate enough raises the advantage.

The policy is a = K s + L ε = φ ψ with ψ = (s, ε), ε standard normal and parameters φ = (K, L). The
dynamics are linear and the reward is quadratic, so Q^π and ∇_a Q^π have closed forms (`Policy`).

**Eq. 6.** Write F(φ') = E_s E_ε Q^π(s, μ_φ'(ε|s)) with Q^π held fixed; A(φ', φ) = F(φ') - F(φ) is
the empirical advantage. Here ∇_φ μ · f is f ψᵀ, so the true policy gradient is ∇F = E[∇_a Q ψᵀ],
the direction of the step is G = E[g ψᵀ], and Eq. 6 reads ‖G - ∇F‖ ≤ α ‖∇F‖.

**k̃** is the Lipschitz constant of ∇F. Since ∇_a Q(s, a) = -2 (H a + N s), two parameters φ₁, φ₂
have ∇F(φ₁) - ∇F(φ₂) = -2 H (φ₁ - φ₂) S with S = E[ψ ψᵀ], so k̃ = 2 λmax(H) λmax(S) = κ_q λmax(S).

**Proof.** A(φ + η G, φ) ≥ η ⟨∇F, G⟩ - k̃ η² ‖G‖² / 2 because ∇F is k̃-Lipschitz. By Eq. 6,
⟨∇F, G⟩ ≥ (1 - α) ‖∇F‖² and ‖G‖ ≤ (1 + α) ‖∇F‖. So η ≤ (1 - α) / (1 + α)² / k̃ gives
A ≥ η (1 - α) ‖∇F‖² / 2, which is positive.

**What the statement leaves open.**
- Every step below 2 / (1 + α) / k̃ is safe, because Eq. 6 also implies ⟨∇F, G⟩ ≥ ‖G‖² / (1 + α).
- Where ∇F = 0, Eq. 6 allows no step, and the advantage is zero rather than positive.
- With a Gaussian ε, ‖∇_φ μ‖ has no bound κ_μ, but its mean square is enough: k̃ ≤ κ_q E‖ψ‖².
"""

import numpy as np
import pytest
from numpy.linalg import norm  # of a matrix: the root of the sum of its squares
from scipy.linalg import solve_discrete_are, solve_discrete_lyapunov
from scipy.optimize import brentq

GAMMA = 0.9
A = np.array([[0.9, 0.3, 0.0], [-0.3, 0.9, 0.1], [0.0, 0.2, 0.8]])  # s' = A s + B a
B = np.array([[0.2, 0.0], [0.5, 0.3], [0.0, 0.8]])
C, R = np.diag([1.0, 2.0, 0.5]), np.diag([0.3, 0.1])  # r = -(sᵀ C s + aᵀ R a)

# Every state of the data set with four ε of mean 0 and covariance 1, which is exact for quadratics.
DATA = np.random.default_rng(0).uniform(-1, 1, (40, 3)) * [1.5, 0.8, 0.3]
EPS = np.sqrt(2) * np.vstack([np.eye(2), -np.eye(2)])
STATES = np.repeat(DATA, 4, axis=0)
PSI = np.hstack([STATES, np.tile(EPS, (40, 1))])  # (160, 5)
S = PSI.T @ PSI / 160


def average(f: np.ndarray) -> np.ndarray:
    """The average gradient operator of Eq. 6, E[∇_φ μ · f]; f has a row for every (s, ε)."""
    return f.T @ PSI / 160


def quadratic(x: np.ndarray, W: np.ndarray) -> np.ndarray:
    return (x @ W * x).sum(1)


class Policy:
    """a = φ ψ, with V(s) = -sᵀ P s - v and Q(s, a) = -(sᵀ C s + aᵀ R a) + γ V(A s + B a)."""

    def __init__(self, phi: np.ndarray):
        self.phi, (K, L) = phi, np.split(phi, [3], axis=1)
        M = np.sqrt(GAMMA) * (A + B @ K)
        self.P = solve_discrete_lyapunov(M.T, C + K.T @ R @ K)  # = C + Kᵀ R K + Mᵀ P M
        self.H, self.N = R + GAMMA * B.T @ self.P @ B, GAMMA * B.T @ self.P @ A
        self.v = np.trace(L.T @ self.H @ L) / (1 - GAMMA)
        self.kappa_q = 2 * np.linalg.eigvalsh(self.H)[-1]
        self.k = self.kappa_q * np.linalg.eigvalsh(S)[-1]
        self.action_gradients = self.action_gradient(STATES, PSI @ phi.T)
        self.gradient = average(self.action_gradients)  # ∇F

    def q(self, s: np.ndarray, a: np.ndarray) -> np.ndarray:
        value = -quadratic(s @ A.T + a @ B.T, self.P) - self.v
        return -quadratic(s, C) - quadratic(a, R) + GAMMA * value

    def action_gradient(self, s: np.ndarray, a: np.ndarray) -> np.ndarray:
        return -2 * (a @ self.H + s @ self.N.T)

    def advantage(self, phi: np.ndarray) -> float:
        return (self.q(STATES, PSI @ phi.T) - self.q(STATES, PSI @ self.phi.T)).mean()

    def ascend(self, eta: float, error: np.ndarray) -> tuple[float, float]:
        """The relative error of Eq. 6 and the advantage of a step along g = ∇_a Q + error."""
        G = average(self.action_gradients + error)
        alpha = norm(G - self.gradient) / norm(self.gradient)
        return alpha, self.advantage(self.phi + eta * G)

    def errors(self, alpha: float, eta: float) -> list[np.ndarray]:
        """Errors of ∇_a Q with relative error α in Eq. 6: 300 directions, then too large and too
        small gradients, then the one whose step eta has the lowest advantage of all.

        The advantage is quadratic and concave in G - ∇F = E. In the eigenbasis of its curvature the
        minimum on the sphere ‖E‖ = α ‖∇F‖ is -slope / (x + gap) for some x > 0 (if eta k̃ ≠ 1).
        """
        radius = alpha * norm(self.gradient)
        (h, U), (sigma, V) = np.linalg.eigh(self.H), np.linalg.eigh(S)
        curvature = 2 * np.outer(h, sigma)
        slope = (U.T @ self.gradient @ V) * (1 - eta * curvature)
        gap, bound = eta * (self.k - curvature), norm(slope) / radius
        x = brentq(lambda x: norm(slope / (x + gap)) - radius, 1e-9 * bound, bound)
        directions = np.random.default_rng(1).standard_normal((300, 2, 5))
        averaged = [radius * D / norm(D) for D in directions]
        averaged += [alpha * self.gradient, -alpha * self.gradient, U @ (-slope / (x + gap)) @ V.T]
        # The smallest error with a given average is linear in ψ, so it is a function of s and a.
        return [PSI @ np.linalg.solve(S, E.T) for E in averaged]


P = solve_discrete_are(np.sqrt(GAMMA) * A, np.sqrt(GAMMA) * B, C, R)  # of the best policy
H = R + GAMMA * B.T @ P @ B
BEST_K = -np.linalg.solve(H, GAMMA * B.T @ P @ A)
# The costliest: nearly all of the noise lies where actions cost most, so that ∇F has almost exactly
# the direction of the largest curvature. That is the proposition's worst case.
costliest = Policy(np.hstack([BEST_K, np.linalg.eigh(H)[1] @ np.diag([0.005, 0.5])]))
OFFSETS = 0.2 * np.random.default_rng(2).standard_normal((2, 2, 5))
POLICIES = [costliest, *(Policy(np.hstack([BEST_K, 0.3 * np.eye(2)]) + D) for D in OFFSETS)]
each_policy = pytest.mark.parametrize("policy", POLICIES, ids=["costliest", "random", "random"])


@pytest.fixture
def rng():
    return np.random.default_rng(3)


@each_policy
def test_q_is_the_expected_discounted_sum_of_rewards(policy, rng):
    K, L = np.split(policy.phi, [3], axis=1)
    s, a = rng.standard_normal((5, 3)), rng.standard_normal((5, 2))
    totals, following = -quadratic(s, C) - quadratic(a, R), s @ A.T + a @ B.T
    moments = following[:, :, None] * following[:, None]  # E[s_t s_tᵀ]
    for t in range(1, 400):
        costs = (moments * (C + K.T @ R @ K)).sum((1, 2)) + np.trace(L.T @ R @ L)
        totals -= GAMMA**t * costs
        moments = (A + B @ K) @ moments @ (A + B @ K).T + B @ L @ L.T @ B.T
    assert policy.q(s, a) == pytest.approx(totals, rel=1e-10)
    expected = policy.q(STATES, PSI @ policy.phi.T).reshape(40, 4).mean(1)  # E_ε Q = V
    assert expected == pytest.approx(-quadratic(DATA, policy.P) - policy.v)


@each_policy
def test_the_action_gradient_is_that_of_q_and_kappa_q_its_lipschitz_constant(policy, rng):
    s, a, b = rng.standard_normal((300, 3)), *rng.standard_normal((2, 300, 2))
    gradient = policy.action_gradient(s, a)
    for i, d in enumerate(np.eye(2)):  # central differences are exact for quadratics
        assert (policy.q(s, a + d) - policy.q(s, a - d)) / 2 == pytest.approx(gradient[:, i])
    ratios = norm(policy.action_gradient(s, b) - gradient, axis=1) / norm(b - a, axis=1)
    assert 0.999 * policy.kappa_q < ratios.max() <= policy.kappa_q * (1 + 1e-12)


@each_policy
def test_the_averaged_gradient_is_that_of_the_advantage_and_k_its_lipschitz_constant(policy, rng):
    for D in rng.standard_normal((20, 2, 5)):
        slope = (policy.advantage(policy.phi + D) - policy.advantage(policy.phi - D)) / 2
        assert slope == pytest.approx((policy.gradient * D).sum())

    def ratio(phi_1, phi_2):
        gradients = [average(policy.action_gradient(STATES, PSI @ p.T)) for p in (phi_1, phi_2)]
        return norm(gradients[0] - gradients[1]) / norm(phi_1 - phi_2)

    assert max(ratio(*pair) for pair in rng.standard_normal((300, 2, 2, 5))) <= policy.k
    u, v = np.linalg.eigh(policy.H)[1][:, -1], np.linalg.eigh(S)[1][:, -1]
    assert ratio(policy.phi + np.outer(u, v), policy.phi) == pytest.approx(policy.k)
    assert policy.k <= policy.kappa_q * (PSI**2).sum(1).mean()  # κ_q E‖∇_φ μ‖²


@each_policy
@pytest.mark.parametrize("alpha", [0.05, 0.2, 0.5, 0.95])
def test_the_step_of_proposition_1_raises_the_advantage_whatever_the_error(policy, alpha):
    eta = (1 - alpha) / (1 + alpha) ** 2 / policy.k  # the largest that the proposition allows
    proved = eta * (1 - alpha) / 2 * norm(policy.gradient) ** 2
    limit = 2 / (1 + alpha) / policy.k
    for step, least in ((eta, proved), (limit / 2, 0), (0.99 * limit, 0)):
        alphas, advantages = zip(*(policy.ascend(step, e) for e in policy.errors(alpha, step)))
        assert alphas == pytest.approx([alpha] * 303)
        assert advantages[-1] <= min(advantages) * (1 + 1e-9)  # the last error is the worst
        assert min(advantages) >= least and min(advantages) > 0


@pytest.mark.parametrize("alpha, times", [(0.05, 2.3), (0.2, 3.1), (0.3, 3.8), (0.5, 6.1)])
def test_a_step_a_few_times_larger_can_lower_the_advantage(alpha, times):
    too_large = alpha * costliest.action_gradients  # a critic whose gradients are 1 + α too large
    eta = (1 - alpha) / (1 + alpha) ** 2 / costliest.k
    measured, advantage = costliest.ascend(times * eta, too_large)
    assert measured == pytest.approx(alpha) and advantage < 0
    assert costliest.ascend(0.95 * times * eta, too_large)[1] > 0


@each_policy
@pytest.mark.parametrize("alpha", [1.01, 3])
def test_with_alpha_above_1_an_error_lowers_the_advantage_at_every_step(policy, alpha):
    for eta in np.geomspace(1e-4, 1, 9) / policy.k:
        measured, advantage = policy.ascend(eta, -alpha * policy.action_gradients)
        assert measured == pytest.approx(alpha) and advantage < 0


def test_where_the_gradient_is_zero_the_advantage_of_eq_6_is_not_positive(rng):
    policy = Policy(np.hstack([BEST_K, np.zeros((2, 2))]))
    assert norm(policy.gradient) < 1e-12  # so G = 0 under Eq. 6
    assert all(policy.advantage(policy.phi + D) <= 0 for D in rng.standard_normal((100, 2, 5)))
