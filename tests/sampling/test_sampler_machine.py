"""Any sequence of updates, feedback, publications and draws agrees with explicit per-example weights."""

from __future__ import annotations

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from sampling_oracle import Oracle

from dask_isgd.config import Sampling
from dask_isgd.sampling import ImportanceSampler

NORMS = st.one_of(st.just(0.0), st.floats(2.0**-10, 2.0**10, width=32))
POLICIES = st.fixed_dictionaries(
    {
        "scheme": st.sampled_from(["stratified", "independent", "systematic"]),
        "smoothing": st.sampled_from([0.0, 0.1, 1.0]),
        "max_coefficient": st.sampled_from([None, 1.5, 20.0]),
        "ess_fraction": st.sampled_from([None, 0.3, 0.95]),
        "half_life_steps": st.sampled_from([None, 2.0, 50.0]),
        "max_age_steps": st.sampled_from([None, None, 1, 10]),
        "ema_decay": st.sampled_from([0.0, 0.0, 0.5, 0.9]),
        "ema_steps": st.sampled_from([None, 5.0, 1000.0]),
        "exponent": st.sampled_from([1.0, 0.5, 2.0]),
    }
)


class SamplerMachine(RuleBasedStateMachine):
    @initialize(n=st.integers(1, 200), chunk_size=st.integers(1, 150), policy=POLICIES)
    def start(self, n, chunk_size, policy):
        self.sampling = Sampling(**policy)
        self.sampler = ImportanceSampler(n, chunk_size, self.sampling)
        self.oracle = Oracle(n, min(chunk_size, n), self.sampling)
        self.step = 0

    @rule(data=st.data(), lag=st.integers(0, 8))
    def update(self, data, lag):
        chunk = data.draw(st.integers(0, self.sampler.n_chunks - 1))
        length = int((self.oracle.chunk_of == chunk).sum())
        rng = np.random.default_rng(data.draw(st.integers(0, 99)))
        weights = rng.choice([0.0, *data.draw(st.lists(NORMS, min_size=1, max_size=5))], size=length)
        version = max(0, self.step - lag)
        assert self.sampler.update(chunk, weights, version) == 0
        self.oracle.update(chunk, weights, version)

    @rule(data=st.data())
    def feedback(self, data):
        index = st.integers(0, self.sampler.n - 1)
        norms = data.draw(st.dictionaries(index, NORMS, min_size=1, max_size=6))
        self.sampler.feedback(list(norms), list(norms.values()), self.step)
        self.oracle.feedback(norms.keys(), norms.values(), self.step)

    @rule(steps=st.one_of(st.integers(1, 6), st.integers(100, 3000)))
    def train(self, steps):
        self.step += steps

    @rule()
    def publish(self):
        self.sampler.refresh(self.step)
        self.oracle.step = self.step

    @rule(batch=st.integers(1, 40), seed=st.integers(0, 99))
    def draw(self, batch, seed):
        drawn = self.sampler.draw(batch, np.random.default_rng(seed))
        s, usable = self.oracle.proposal()
        q = s / s.sum()
        assert (q[drawn.indices] > 0).all()
        np.testing.assert_allclose(drawn.probabilities, q[drawn.indices], rtol=1e-9, atol=1e-14)
        np.testing.assert_allclose(drawn.coefficients * drawn.probabilities * usable.sum(), 1, rtol=1e-12)

    @precondition(lambda self: hasattr(self, "sampler"))
    @invariant()
    def agrees(self):
        s, _ = self.oracle.proposal()
        q = self.sampler.probabilities()
        assert abs(q.sum() - 1) < 1e-12
        np.testing.assert_allclose(q, s / s.sum(), rtol=1e-9, atol=1e-14)
        np.testing.assert_allclose(
            np.concatenate([self.sampler.weights(k) for k in range(self.sampler.n_chunks)]), s, rtol=1e-9
        )
        np.testing.assert_array_equal(self.sampler.versions, self.oracle.versions)


TestSamplerMachine = SamplerMachine.TestCase
TestSamplerMachine.settings = settings(
    max_examples=60,
    stateful_step_count=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
