"""Posterior: what every engine returns, and what people ask of it.

It is a list of Pyro traces with log-weights, of which all else is computed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lmppl.checks import check_callable, check_flag, check_int
from lmppl.lm import LM
from lmppl.posterior.exports import to_arviz, to_dataframe
from lmppl.posterior.marginals import check_levels, distinct, of_sample, quantiles
from lmppl.posterior.questions import of_one
from lmppl.posterior.replaying import rerun
from lmppl.posterior.saving import Samples, load_samples, save_samples
from lmppl.posterior.summary import is_number, joint_rows, remedies, summarise
from lmppl.posterior.weighted import WeightedTraces
from lmppl.primitives import use
from lmppl.report.particle_page import particle_page
from lmppl.report.particles import ParticleStep, draw_particles
from lmppl.report.plots import bars, histogram
from lmppl.report.posteriors import joint_blocks, posterior_blocks
from lmppl.report.tables import Block, Report, Shown
from lmppl.runtime import estimates
from lmppl.runtime.arguments import bind
from lmppl.runtime.sites import values_of
from lmppl.states import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NameOrFn = str | Callable[[dict[str, Any]], Any]
"""The name of a site, or a function of one sample's values, which it gets as a dict by site."""


class Posterior(WeightedTraces, Report):
    """Weighted traces of a program. (``copy.deepcopy`` shares its language models.)

    Args:
        traces: K traces; those of weight zero may be incomplete.
        log_weights: shape ``(K,)``, nats, with logmeanexp(log_weights) = log evidence; ``-inf`` for
            a sample of probability zero. Kept in float64 on the CPU.
        returns: what the program returned in each trace.
        guide: the guide, if one was trained.
        info: what the engine has to say of the run. The posterior itself reads

            - ``engine``: its name;
            - ``iid``: whether the weights are independent and identically distributed, so that
              the evidence has the textbook standard error (SMC's and enumeration's are not);
            - ``exact``: whether the weights are the probabilities themselves, as of an enumeration, so
              that a small effective sample size is no reason for doubt;
            - ``has_guide``: whether the run had a guide, which could be a better one;
            - ``tokens_sampled``, ``tokens_scored``, ``tokens_trained``, ``seconds``: what it cost;
            - ``killed``: name of a site to the number of samples that it gave probability zero;
            - ``reasons``: name of such a site to one sentence, why the first sample ended there;
            - ``notes``: a list of sentences the reader must know ("the target is tempered");
            - ``ess``: the effective sample size, where that of the weights is not it (the draws of
              Markov chains have equal weights, and depend on each other); NaN: not known;
            - ``seed``: that of the run;
            - ``islands``: of independent runs that were pooled, a dict for each: its ``num_samples``,
              and what its own ``info`` said;
            - ``chain``: of Markov chains, the pair (chain, draw) of each trace, counted from 0;
            - ``chains``: how these mixed, as the table shows it: a dict of ``num_chains``,
              ``num_draws`` (of each chain), ``acceptance`` (site to the share of moves accepted)
              and ``diagnostics`` (name of a function to its ``r_hat``, ``ess_bulk``, ``ess_tail``).
        claims_evidence: False where the mean weight does not estimate the evidence (raw draws of
            an uncorrected guide): ``log_evidence`` is None.

    Attributes:
        profile: where the time went, if ``infer`` was called with ``profile=True``; else None.
        genealogies: of each island, what gives the steps of its particles, as ``particles`` has them;
            None: not known.

    Raises:
        ValueError: if the lengths differ, there are no traces, or a log-weight is NaN or +inf.
    """

    @of_one
    def probs(
        self, name_or_fn: NameOrFn | None = None, *, returns: bool = False
    ) -> dict[Any, float]:
        """Posterior probability of each value, the largest first; they sum to 1.

        ```python
        posterior.probs("z")                          # of a site
        posterior.probs(lambda v: v["z"].split()[0])  # of a sample's values, by site
        posterior.probs(returns=True)                 # of what the program returns
        ```

        Texts that are equal as strings count as one; tensors are numbers or nested tuples; lists,
        dicts and the like are their ``repr``; None: a site that a branch does not reach.

        Args:
            name_or_fn: the name of a site, or a function of one sample's values, which it gets as a
                dict by site.
            returns: take what the program returned, in place of a site.

        Raises:
            KeyError: if no trace has such a site.
            TypeError: for a continuous site, whose values are all different; unless one of both is
                given.
            ZeroEvidenceError: if all samples have probability zero.
        """
        if (name_or_fn is None) == (check_flag("returns", returns) is False):
            raise TypeError(
                "say of what: either the name of a site, a function of a sample's values, or "
                f"returns=True. Sites: {', '.join(self.sites)}"
            )
        if returns:
            values = self.returns
        elif isinstance(name_or_fn, str):
            values = self[name_or_fn]
            if is_number(self._nodes(name_or_fn)):
                raise TypeError(
                    f"site '{name_or_fn}' is continuous, so each sample has a value of its own: use "
                    f".mean('{name_or_fn}') or .quantile('{name_or_fn}', [0.05, 0.95]), or "
                    f".resample(n)['{name_or_fn}'] for unweighted draws"
                )
        else:
            check_callable("name_or_fn", name_or_fn)
            assert name_or_fn is not None
            # Samples of weight zero may be incomplete.
            values = [name_or_fn(values_of(t)) if weight > 0 else None for t, weight in self]
        return {value: share for (value,), share in distinct([values], self.weights.tolist())}

    @of_one
    def best(self, name_or_fn: NameOrFn | None = None, *, returns: bool = False) -> Any:
        """The most probable value that is not None; None if there is no other.

        Args:
            name_or_fn: the name of a site or a function, as of ``probs``.
            returns: take what the program returned, in place of a site.

        Raises:
            KeyError, TypeError, ZeroEvidenceError: as ``probs``.
        """
        found = self.probs(name_or_fn, returns=returns)
        return next((value for value in found if value is not None), None)

    @of_one
    def plot(
        self,
        name_or_fn: NameOrFn | None = None,
        *,
        returns: bool = False,
        prior: Posterior | None = None,
        rows: int = 10,
        path: str | os.PathLike[str] | None = None,
    ) -> Figure:
        """Draw the posterior of a site: bars of the most probable values, or a histogram where they are
        continuous. Needs matplotlib.

        ```python
        prior = lmppl.infer(infill, x, lm=lm, method="importance")     # the ending is not observed
        posterior.plot("z", prior=prior, path="middles.svg")
        ```

        Args:
            name_or_fn: what to draw, as ``probs`` takes it.
            returns: draw what the program returned.
            prior: another posterior of the same program to draw beside it, with less observed.
            rows: so many values; the probability of the others is one bar.
            path: also write the figure to this file; its ending says the format (none: PNG).

        Returns:
            A matplotlib figure, which notebooks show.

        Raises:
            ImportError: if matplotlib is not installed.
            KeyError, ZeroEvidenceError: as ``probs``.
            TypeError: for a ``prior`` that is no posterior.
            ValueError: for a continuous site whose values are vectors.
        """
        rows = check_int("rows", rows)
        if prior is not None and not isinstance(prior, Posterior):
            raise TypeError(f"prior= takes a Posterior, given {type(prior).__name__}")
        drawn = {"posterior": self} | ({} if prior is None else {"prior": prior})
        named = isinstance(name_or_fn, str)
        title = name_or_fn if isinstance(name_or_fn, str) else "returned" if returns else ""
        if named and not check_flag("returns", returns) and is_number(self._nodes(title)):
            numbers = {name: one._numbers(title) for name, one in drawn.items()}
            shape = numbers["posterior"][0].shape[1:]
            if shape.numel() != 1:
                raise ValueError(
                    f"site '{title}' has values of shape {tuple(shape)}: a histogram is of numbers"
                )
            flat = {name: (v.flatten().tolist(), w.tolist()) for name, (v, w) in numbers.items()}
            return histogram(flat, title, path)
        found = {name: one.probs(name_or_fn, returns=returns) for name, one in drawn.items()}
        return bars(found, title, rows, path)

    @property
    def particles(self) -> list[ParticleStep]:
        """What SMC's particles went through: at every barrier, and at every resampling within a text,
        what they weighed, whose copies went on, and what each had for the latent sites. The last step
        is the end; it has the weights and values of the posterior's own samples.

        ```python
        for step in posterior.particles:
            print(step.title, step.ess, step.ancestors)
        ```

        The engine always takes this down: it costs some numbers a particle and step, and the tokens' ids
        of texts, which are decoded here. It is of the run, so a posterior that was resampled has it
        too. It is not saved; ``particles_html`` writes what can be kept. Where particles are moved
        (``rejuvenate=``), their values may differ from those of their ancestors; without, a
        text begins with that of its ancestor.

        Raises:
            ValueError: by another engine, for a posterior that was loaded, or for one of several
                islands, each of which has a record: ``posterior.islands[0].particles``.
        """
        if len(self.genealogies) > 1:
            raise ValueError(
                f"the particles of {len(self.genealogies)} islands never met, so each island has a "
                "record of its own: posterior.islands[0].plot_particles(), for example (of a posterior "
                "as it was before posterior.resample)"
            )
        genealogy = self.genealogies[0]
        if genealogy is None:
            engine = self.info.get("engine")
            why = (
                "what they went through is not saved: run the engine again, or write "
                "posterior.particles_html(path) before posterior.save(path)"
                if engine == "smc"
                else "only particles of method='smc' are copies of each other"
            )
            by = f" by {engine}" if engine else ""
            raise ValueError(f"this posterior{by} has no record of particles; {why}")
        return genealogy()

    def plot_particles(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Draw what SMC's particles went through: a row a particle, a column a step, with weights,
        effective sample sizes, texts, and lines from particles to their copies. Needs matplotlib.

        Where there are more than four steps there is room for the texts of the last alone;
        ``particles_html`` has all of them.

        Args:
            path: also write the figure to this file; its ending says the format (none: PNG).

        Returns:
            A matplotlib figure, which notebooks show.

        Raises:
            ImportError: if matplotlib is not installed.
            ValueError: as ``particles``.
        """
        return draw_particles(self.particles, path)

    def particles_html(self, path: str | os.PathLike[str] | None = None) -> str:
        """What ``plot_particles`` draws as a page of HTML, with the texts of all particles at all steps.
        (Of a long text that was there at the step before, it has the end.) The page needs nothing
        else, no server and no script.

        Args:
            path: also write it to this file, which is there whole or not at all.

        Raises:
            OSError: if it cannot be written.
            ValueError: as ``particles``.
        """
        page = particle_page(self.particles, self.info.get("engine", "smc"))
        if path is not None:
            write_text(Path(path), page)
        return page

    @of_one
    def mean(self, name_or_fn: NameOrFn) -> torch.Tensor:
        """Posterior expectation of a numeric site or a function.

        ``posterior.mean(lambda v: v["z"].endswith("."))`` is a probability.

        Args:
            name_or_fn: the name of a site, or a function from the values of one trace (a dict by
                site) to a number, a bool or a tensor.

        Returns:
            float64, of the value's shape.

        Raises:
            KeyError: if no trace has such a site.
            TypeError: for a site whose values are texts.
            ValueError: if a live sample has not reached the site.
            ZeroEvidenceError: if all samples have probability zero.
        """
        values, weights = self._numbers(name_or_fn)
        return torch.tensordot(weights, values, 1)

    @of_one
    def quantile(self, name_or_fn: NameOrFn, q: float | Sequence[float]) -> torch.Tensor:
        """Posterior quantiles of a numeric site or a function, as of ``mean``: the smallest value x of a
        sample with P(value <= x) >= q. Nothing is interpolated.

        ```python
        low, middle, high = posterior.quantile("theta", [0.05, 0.5, 0.95])
        ```

        Args:
            name_or_fn: as of ``mean``.
            q: a number from 0 to 1, or a list of them.

        Returns:
            float64, of the value's shape; with a list, behind a dimension for it: ``(len(q), ...)``.

        Raises:
            ValueError: for a ``q`` outside of 0 to 1, or as ``mean``.
            KeyError, TypeError, ZeroEvidenceError: as ``mean``.
        """
        levels = check_levels(q)
        found = quantiles(*self._numbers(name_or_fn), levels.reshape(-1))
        return found.reshape(levels.shape + found.shape[1:])

    def _numbers(self, name_or_fn: NameOrFn) -> tuple[torch.Tensor, torch.Tensor]:
        """What live samples say, (n, *shape), and their weights, (n,), both float64."""
        if isinstance(name_or_fn, str):
            self._check_site(name_or_fn)
        else:
            check_callable("name_or_fn", name_or_fn)
        live = [(t, weight) for t, weight in self if weight > 0]  # others may be incomplete
        values = [of_sample(values_of(trace), name_or_fn) for trace, _ in live]
        weights = torch.tensor([weight for _, weight in live], dtype=torch.float64)
        return torch.stack(values), weights

    def to_dataframe(self, *, returns: bool = False) -> Any:
        """A pandas data frame with a row a sample.

        Its columns are ``weight`` (normalised) and ``log_weight`` (nats), and the values of every site
        by its name, observed ones included: texts as ``str``, numbers, arrays, results of tools as
        they are; None or NaN where a branch does not reach the site. Of Markov chains, there are
        ``chain`` and ``draw`` in front. A site that has one of these names keeps it, and the column
        gets an underscore, ``weight_``.

        Args:
            returns: add what the program returned as ``returned``.

        Raises:
            ImportError: without pandas, ``pip install 'lmppl-pyro[pandas]'``.
        """
        weights = self.weights if self._alive else torch.zeros(len(self), dtype=torch.float64)
        given = self.returns if check_flag("returns", returns) else None
        chain = self.info.get("chain")
        return to_dataframe(self.traces, weights, self.log_weights, chain, given)

    def to_arviz(
        self, *, weighted: bool = False, num_draws: int | None = None, seed: int | None = None
    ) -> Any:
        """The posterior for ArviZ: an ``xarray.DataTree``, with dimensions ``chain`` and ``draw``.

        ArviZ knows no weights. So unless all are equal, the draws are resampled by weight (see
        ``resample``; the tree's attribute ``ess`` tells how much they are worth), or, with
        ``weighted=True``, they are the samples of positive weight as they are, to be weighted by
        ``sample_stats["log_weight"]``, the logarithm of the normalised weights. Samples of Markov
        chains (``info["chain"]``) stay in their chains; all others are one chain.

        The groups are ``posterior`` (latent sites, results of tools, ``pyro.deterministic``),
        ``sample_stats`` (``lp``, the log joint in nats), ``log_likelihood`` and ``observed_data`` (of
        observed sites that every sample reaches; data only where it is the same in all). Texts and
        other objects are in arrays of dtype ``object``. Where a branch does not reach a site, there is
        NaN, as xarray has it for all that is missing (``isnull()``). A ``/`` in a name becomes ``_``,
        and sites named ``chain`` or ``draw`` get an underscore.

        Args:
            weighted: keep the weights instead of resampling.
            num_draws: how many to resample; None: as many as there are samples.
            seed: of the resampling; None: taken from torch's random stream.

        Raises:
            ImportError: without arviz-base, ``pip install 'lmppl-pyro[arviz]'``.
            ValueError: if chains have different draws.
            ZeroEvidenceError: if all samples have probability zero.
        """
        if check_flag("weighted", weighted) and num_draws is not None:
            raise ValueError("num_draws= is of draws that are resampled: drop it, or weighted=True")
        live = [i for i, weight in enumerate(self.weights.tolist()) if weight > 0]
        chain, draws, told = self.info.get("chain"), self, None
        if weighted:
            draws, told = self, self.weights[live]
        elif num_draws is not None or not bool((self.log_weights == self.log_weights[0]).all()):
            draws, chain = self.resample(num_draws or len(self), seed), None
            live = list(range(len(draws)))
        chain = None if chain is None else [chain[i] for i in live]
        facts = {
            "engine": self.info.get("engine"), "num_samples": len(self), "ess": self.ess,
            "log_evidence": self.log_evidence, "notes": list(draws.info.get("notes", ())),
        }  # fmt: skip
        known = {name: fact for name, fact in facts.items() if fact is not None}
        return to_arviz([draws.traces[i] for i in live], told, chain, known)

    def __reduce__(self) -> Any:
        raise TypeError(
            "a Posterior holds language models and a program's objects and is not pickled: use "
            "posterior.save(path) and lmppl.Posterior.load(path, lm=lm), or store posterior.summary()"
        )

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the posterior into a folder, from which ``Posterior.load`` reads it. It is there
        whole or not at all; its format is JSON and safetensors, no pickle.

        Saved are the values of all sites (texts with their tokens), their log-probabilities, the
        log-weights, and what is plain of the returned values, results of tools and ``info``: None,
        bools, numbers, strings, texts, tensors, and lists, tuples, sets and dicts of these. For any
        other value its ``repr`` is kept. The guide (``guide.save``), the profile and the steps of
        particles (``particles_html``) are not saved.

        Args:
            path: the folder.
            overwrite: replace a posterior that is there.

        Raises:
            FileExistsError: if the folder exists, unless it is a posterior and ``overwrite`` is set.
            OSError: if it cannot be written; what was there before is kept.
        """
        samples = Samples(
            self.traces, self.log_weights, self.returns, self.info, self._claims_evidence
        )
        save_samples(path, samples, overwrite=overwrite)

    @classmethod
    def load(
        cls,
        path: str | Path,
        model: Callable[..., Any] | None = None,
        *args: Any,
        lm: LM | Sequence[LM] | None = None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> Posterior:
        """Read a posterior that ``save`` wrote.

        ```python
        load = lmppl.Posterior.load
        posterior = load("runs/infill")                       # to look at
        posterior = load("runs/infill", lm=lm)                # texts with their tokens
        posterior = load("runs/infill", infill, x, y, lm=lm)  # whole traces
        ```

        Without anything else it answers all questions about values: ``probs``, ``mean``,
        ``quantile``, tables, evidence, ``resample``, ``to_arviz``; texts are plain strings. With
        ``lm`` they are a ``Text`` each, to be used in prefixes. The traces have all values and
        log-probabilities, so Markov chains can begin at them (``MCMC(initial=...)``) and guides
        learn from them (``demonstrations=``), but no distributions (``site["fn"]``): whoever asks
        these, as ``poutine`` may, needs the program as well. It is run again on the values of every
        sample that is alive, which asks no language model, and compared site by site.

        Args:
            path: the folder.
            model: the program, as of ``infer``; None: only values are wanted.
            *args: its positional arguments.
            lm: the language model that it was made with, or a list of several.
            kwargs: the program's arguments by name.

        Raises:
            FileNotFoundError: if there is no posterior.
            TypeError: for arguments without a program.
            ValueError: if a file is damaged or of another format, the texts are of another tokenizer,
                or the program or its arguments are others; says which.
        """
        if model is None and (args or kwargs):
            raise TypeError("Posterior.load: arguments need the program: load(path, model, *args)")
        lms = [] if lm is None else [lm] if isinstance(lm, LM) else list(lm)
        program, args = (None, ()) if model is None else bind(model, args, kwargs)
        loaded = load_samples(path, lms)
        samples = loaded.samples
        traces, returns = list(samples.traces), list(samples.returns)
        if program is not None:
            with use(lms[0]) if lms else nullcontext():
                again = rerun(loaded, program, args)
            for i, number in enumerate(loaded.trace):
                if number in again:
                    traces[i], returns[i] = again[number]
        info = dict(samples.info)
        claims = samples.claims_evidence
        return cls(traces, samples.log_weights, returns, info=info, claims_evidence=claims)

    def summary(self, *, joint: bool = False) -> dict[str, Any]:
        """The posterior in plain Python values, as the table shows it. Never raises ZeroEvidenceError.

        Args:
            joint: adds ``"rows"``, the distinct joint values of the discrete latent sites
                (``"sites"``), most probable first: ``{"weight": 0.31, "values": {"z": " ..."}}``; a
                site that a sample did not reach is missing there.

        Returns:
            A dict of

            - ``marginals``: site to its distinct values, most probable first,
              ``[{"weight": 0.31, "value": " ..."}, ...]``: of latent sites, of the results of tools
              (their names are in ``tools``) and of ``pyro.deterministic``. None: not reached.
            - ``numeric``: of those with real numbers, site to ``mean``, ``sd``, ``5%``, ``50%`` and
              ``95%`` over the samples that reach it, and the ``weight`` of these.
            - ``returned``: the same of what the program returned, ``{"rows": [...]}`` or
              ``{"numeric": {...}}``; None if that is nothing or always a site's value.
            - ``doubts``: sentences, why the figures cannot be trusted.
            - ``remedies``: what may help against these, by the engine; none without doubts.
            - ``islands``: how many independent runs were pooled; 1: it is a single one.
            - ``pareto_k``: shape of the weights' upper tail, if they are i.i.d. and arviz-stats is
              installed (Vehtari et al., 2024, arXiv 1507.02646); else None.
            - ``engine``, ``num_samples``, ``ess``, ``chains``, ``log_evidence``,
              ``log_evidence_stderr``, ``tokens_sampled``, ``tokens_scored``, ``tokens_trained``,
              ``seconds``, ``killed``, ``reasons`` and ``notes``.
        """
        weights = self.weights.tolist() if self._alive else [0.0] * len(self)
        summary = self._run() | summarise(self.traces, weights, self.sites, self.returns)
        if check_flag("joint", joint):
            names = [name for name in self.latents if not is_number(self._nodes(name))]
            rows = joint_rows({name: self[name] for name in names}, weights) if names else []
            summary |= {"sites": names, "rows": rows}
        return summary

    def _run(self) -> dict[str, Any]:
        """What the summary says of the run: all but the samples' values."""
        costs = ("tokens_sampled", "tokens_scored", "tokens_trained", "seconds")
        k, engine = self._pareto_k, self.info.get("engine")
        doubts = self._doubts(k)
        return {
            "engine": engine,
            "num_samples": len(self),
            "ess": self.ess,
            "islands": len(self._island_sizes),
            "chains": self.info.get("chains"),
            "log_evidence": self.log_evidence,
            "log_evidence_stderr": self.log_evidence_stderr,
            **{cost: self.info.get(cost) for cost in costs},
            "pareto_k": k,
            "doubts": doubts,
            "remedies": remedies(engine, bool(self.info.get("has_guide"))) if doubts else [],
            "killed": dict(self.killed.most_common()),
            "reasons": self.reasons,
            "notes": list(self.info.get("notes", ())),
        }

    @property
    def _pareto_k(self) -> float | None:
        live = self.log_weights[self.log_weights > -math.inf]
        return estimates.pareto_k(live.numpy())[0] if self.info.get("iid") else None

    def _doubts(self, pareto_k: float | None) -> list[str]:
        """Why the figures cannot be trusted."""
        if not self._alive or self.info.get("exact"):
            return []  # nothing is claimed; nothing is estimated
        chains = (self.info.get("chains") or {}).get("diagnostics") or {}
        r_hats = {name: found.get("r_hat") for name, found in chains.items()}
        shares = torch.softmax(self._island_totals, 0).tolist()
        return estimates.doubts(self.ess, pareto_k, r_hats, shares)

    def table(self, *names: str, joint: bool = False, rows: int | None = None) -> Report:
        """The table that ``print(posterior)`` shows, of other sites or with more rows. Print it, or let
        a notebook show it.

        ```python
        print(posterior.table(joint=True))       # the latents' values together
        print(posterior.table("z", rows=50))     # one site
        ```

        Args:
            *names: the sites to show, each by its marginal; none: latents and what the program computes.
            joint: show the joint values of the discrete sites instead.
            rows: at most so many rows a table; None: few, so that the whole stays short.

        Raises:
            KeyError: if no trace has such a site.
        """
        rows = None if rows is None else check_int("rows", rows)
        for name in names:
            self._check_site(name)
        weights = self.weights.tolist() if self._alive else [0.0] * len(self)
        summary = self._run()
        if check_flag("joint", joint):
            columns = [n for n in names or self.latents if not is_number(self._nodes(n))]
            found = joint_rows({name: self[name] for name in columns}, weights) if columns else []
            return Shown(joint_blocks(summary | {"sites": columns, "rows": found}, rows))
        shown = (names, None) if names else (self.sites, self.returns)
        summary |= summarise(self.traces, weights, *shown, observed=bool(names))
        return Shown(posterior_blocks(summary, rows))

    def _blocks(self) -> list[Block]:
        return posterior_blocks(self.summary())
