"""mini-lmppl: probabilistic programs whose random variables are texts of a language model, in one file.

What mini-pyro is to Pyro, this is to lmppl: the whole idea, to be read in one sitting. A program draws
texts from a language model (LM) and observes others. Its traces have an exact density R, so it can be
conditioned: by enumeration, by importance sampling, by sequential Monte Carlo (SMC), and by a guide,
a LoRA adapter of the LM that learns to draw from the posterior and serves the samplers as a proposal.

    python examples/mini_lmppl.py                                  # a random LM of four tokens: seconds
    python examples/mini_lmppl.py --model ~/.cache/lmppl/smollm2*  # lmppl's, or any causal LM: minutes

With the random LM all engines print about the same log evidence, and the effective sample size (ESS)
is larger with the guide. What the library has and this leaves out: speed, constraints, choices, tools,
temperature, twists, MCMC; truncations and dead traces in training; byte-exact tokens; diagnostics.
"""

import argparse
import copy
import math
from collections import Counter
from dataclasses import dataclass, replace
from inspect import signature
from types import SimpleNamespace

import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

NAMES = signature(hf.LlamaForCausalLM.forward).parameters  # transformers 5.24 has renamed the cache
CACHE = "cache" if "cache" in NAMES else "past_key_values"


# --- 1. A language model is a distribution over token sequences ----------------------------------
# A string can be several token sequences, each with its own probability. So a text keeps its tokens.
class Text(str):
    token_ids = prefix_ids = ()  # all; those that it adds to a prefix, without EOS


# All that a program needs of a Hugging Face model and its tokenizer.
class LM:
    def __init__(self, model, tokenizer):
        self.model, self.tokenizer, self.memory = model.eval(), tokenizer, {}
        self.bos = tuple(tokenizer("").input_ids)  # what the tokenizer puts in front of a text
        holders = tokenizer, model.config, model.generation_config
        ends = [getattr(holder, "eos_token_id", None) for holder in holders]
        self.eos_ids = sum([e if isinstance(e, list) else [e] for e in ends if e is not None], [])

    def text(self, ids):
        shown = tuple(token for token in ids if token not in self.eos_ids)
        text = Text(self.tokenizer.decode(shown, clean_up_tokenization_spaces=False))
        text.token_ids, text.prefix_ids = tuple(ids), shown
        return text

    def encode(self, prefix):  # a string, or a list of strings and texts
        ids = ()
        for part in [prefix] if isinstance(prefix, str) else prefix:
            known = part.prefix_ids if isinstance(part, Text) else None
            ids += known or tuple(self.tokenizer.encode(part, add_special_tokens=False))
        return ids

    # log p of every next token, after each of the last `last` tokens: (last, V), nats. Without gradient,
    # answers are kept for who asks again, and keys and values for the draw of the next token.
    def next_log_probs(self, ids, last=1):
        keep = not torch.is_grad_enabled()
        if keep and (ids, last) in self.memory:
            return self.memory[ids, last]
        read, cache = self.memory.get("read", (None, None))
        goes_on = keep and last == 1 and read == ids[:-1]
        inputs = torch.tensor([ids[-1:] if goes_on else self.bos + ids], device=self.model.device)
        found = self.model(inputs, **{CACHE: cache if goes_on else None}, use_cache=keep)
        log_probs = torch.log_softmax(found.logits[0, -last:].float().cpu(), -1)
        self.memory["read"] = keep and ids, found.get(CACHE)
        if keep and len(self.memory) * log_probs.numel() < 10**7:
            self.memory[ids, last] = log_probs
        return log_probs


# The distribution of a site. Its text closes at the first token that is an EOS or that completes a
# stop string, or at max_tokens. The closing token belongs to the value and counts in the density, which
# is the product of p(t_k | prefix, t_<k). So the probabilities of all values sum to 1.
@dataclass(frozen=True)
class LMText:
    lm: LM
    prefix: tuple  # of token ids; the LM needs one to begin with, be it a BOS
    max_tokens: int | None
    stop: tuple

    def closes(self, ids):
        ended = ids[-1] in self.lm.eos_ids or len(ids) == self.max_tokens
        return ended or any(stop in self.lm.text(ids) for stop in self.stop)

    def sample(self):
        ids = ()
        while not ids or not self.closes(ids):
            probs = self.lm.next_log_probs(self.prefix + ids)[0].exp()
            ids += (int(torch.multinomial(probs, 1)),)
        return self.lm.text(ids)

    def log_prob(self, text):  # by one pass over the prefix and the text
        ids = text.token_ids
        rows = self.lm.next_log_probs(self.prefix + ids[:-1], last=len(ids))  # (n, V)
        return rows.gather(1, torch.tensor(ids)[:, None]).double().sum()

    def enumerate_support(self, ids=()):  # every value, for an LM of a few tokens
        if ids and self.closes(ids):
            return [self.lm.text(ids)]
        tokens = range(self.lm.model.config.vocab_size)
        return [value for token in tokens for value in self.enumerate_support((*ids, token))]

    # An observed text is one that the site could have drawn: if it is open, EOS is appended, and is
    # scored. Without stop and max_tokens there is no end: what is observed is how the text begins.
    def observed(self, text):
        ids = text.token_ids if isinstance(text, Text) else self.lm.encode(text)
        if self.stop or self.max_tokens:
            closed = [n for n in range(1, len(ids) + 1) if self.closes(ids[:n])]
            ids += () if closed else (self.lm.eos_ids[0],)
            if closed and closed[0] < len(ids):
                raise ValueError(f"observed {text!r} closes before its end, at token {closed[0]}")
        return self.lm.text(ids)


# --- 2. A program is a Python function, and handlers say what its sites do -----------------------
# Each call of `sample` makes a message, a dict, and sends it through the handlers on this stack, the
# innermost first. They may give it a value or a proposal; the program knows nothing of them.
STACK = []


class Messenger(SimpleNamespace):
    def __enter__(self):
        STACK.append(self)

    def __exit__(self, *exception):
        STACK.pop()


# A site has two densities: log p under the program, and log q under the proposal that drew it, which is
# the program too if there is no guide. What is observed isn't drawn, so there log q = 0.
def sample(name, fn, obs=None, log_p=None):  # fn: an LMText, or one of torch.distributions
    site = {"name": name, "fn": fn, "proposal": fn, "observed": obs is not None, "value": obs}
    site |= {"log_p": log_p, "log_q": None if obs is None else 0.0}
    for handler in reversed(STACK):
        handler.process(site)
    if site["value"] is None:
        site["value"] = site["proposal"].sample()
    if site["log_p"] is None:
        site["log_p"] = fn.log_prob(site["value"])
    if site["log_q"] is None:
        own = site["proposal"] is fn
        site["log_q"] = site["log_p"] if own else site["proposal"].log_prob(site["value"])
    return site["value"]


def lm_sample(name, prefix, *, lm, max_tokens=None, stop=None, obs=None):
    """A text that continues `prefix`: observed if `obs` is given, else latent."""
    stop = (stop,) if isinstance(stop, str) else tuple(stop or ())
    fn = LMText(lm, lm.encode(prefix), max_tokens, stop)
    if obs is None and max_tokens is None:
        raise ValueError(f"site {name!r} is latent: say max_tokens, or it may never end")
    return sample(name, fn, None if obs is None else fn.observed(obs))


# A factor multiplies R by any number: a preference or, with log 0 = -inf, a condition.
def factor(name, log_weight):
    sample(name, None, obs=(), log_p=torch.tensor(float(log_weight), dtype=torch.float64))


# Records the trace, {name: site}, by keeping every message, which `sample` completes.
class trace(Messenger):
    def process(self, site):
        if site["name"] in self.sites:
            raise ValueError(f"two sites are named {site['name']!r}: give each its own name")
        self.sites[site["name"]] = site


# Takes from another run what is known there: values, and densities unless they are wanted anew. Then so
# many latent sites may be drawn; the next is a barrier, at which the run ends.
class replay(Messenger):
    def process(self, site):
        site.update(self.known.get(site["name"], {}))
        if site["value"] is None:
            if self.draws_left == 0:
                raise Barrier(site["name"], site["fn"])
            self.draws_left -= 1


class Barrier(Exception): ...


# Draws latent texts from a guide's LM, which reads what the guide is told of the observations, then the
# site's prefix. How a text closes is the program's business, so the support of q is that of p.
class propose(Messenger):
    def process(self, site):
        if self.guide and isinstance(site["fn"], LMText) and not site["observed"]:
            prefix = self.guide.lm.encode(self.guide.tell(*self.args)) + site["fn"].prefix
            site["proposal"] = replace(site["fn"], lm=self.guide.lm, prefix=prefix)


def run(program, args, guide=None, known=None, max_draws=math.inf):
    """Run a program. Returns its trace, and the (name, distribution) it waits at; None at its end."""
    sites, known = {}, replay(known=known or {}, draws_left=max_draws)
    with trace(sites=sites), known, propose(guide=guide, args=args):
        try:
            program(*args)
        except Barrier as barrier:
            return sites, barrier.args
    return sites, None


# u = log R - log q of a trace, nats: over draws from q, the mean of exp(u) is the evidence.
def log_weight(sites):
    return sum(site["log_p"] - site["log_q"] for site in sites.values())


# --- 3. Engines: three ways to weighted traces ---------------------------------------------------
# A posterior: traces, with log weights (N,) in nats whose mean exp is an unbiased estimate of the
# evidence. The effective sample size says how many draws from the posterior itself they are worth.
class Posterior:
    def __init__(self, traces, log_weights):
        self.traces, self.log_weights = traces, torch.as_tensor(log_weights, dtype=torch.double)
        self.log_evidence = float(self.log_weights.logsumexp(0)) - math.log(len(log_weights))
        self.weights = self.log_weights.softmax(0)  # nan if all are dead
        self.ess = float(1 / self.weights.square().sum())

    def probs(self, name):  # of the values of a site, the likeliest first
        found = Counter()
        for sites, weight in zip(self.traces, self.weights.tolist(), strict=True):
            found[sites[name]["value"]] += weight
        return dict(found.most_common())


# Enumeration: run to the first latent site, go on with each of its values, and so on; Z is the sum of R.
@torch.no_grad()
def exact(program, args):
    ended, waiting = [], [{}]
    while waiting:
        sites, barrier = run(program, args, known=waiting.pop(), max_draws=0)
        if barrier is None:
            ended.append(sites)
        else:
            values = barrier[1].enumerate_support()
            waiting += [{**sites, barrier[0]: {"value": value, "log_q": 0.0}} for value in values]
    return Posterior(ended, [log_weight(sites) + math.log(len(ended)) for sites in ended])


# Importance sampling: draw from the proposal, and weigh each trace by R / q.
@torch.no_grad()
def importance(program, args, num_samples, guide=None):
    traces = [run(program, args, guide)[0] for _ in range(num_samples)]
    return Posterior(traces, [log_weight(sites) for sites in traces])


# Sequential Monte Carlo: all particles draw a latent site and run on to the barrier before the next,
# paying for what they meet. There they are compared, and copies of the good ones replace the bad. A run
# under way can't be copied in Python, so a particle is its trace, and goes on by running again on what
# is known. One that has ended has paid for everything, and isn't compared with the others.
@torch.no_grad()
def smc(program, args, num_samples, guide=None, ess_threshold=0.5):
    traces, waits = [{}] * num_samples, torch.ones(num_samples, dtype=torch.bool)
    log_weights = torch.zeros(num_samples, dtype=torch.float64)
    while waits.any():
        slots = (waits | (log_weights == -math.inf)).nonzero().flatten()  # also those of the dead
        now = Posterior([], log_weights[slots])
        if now.ess < ess_threshold * len(slots):
            points = (torch.arange(len(slots)) + torch.rand(1).double()) / len(slots)
            shares = now.weights.cumsum(0) / now.weights.sum()
            ancestors = torch.arange(num_samples)
            ancestors[slots] = slots[torch.searchsorted(shares, points, right=True)]
            traces = [traces[ancestor] for ancestor in ancestors]
            log_weights[slots], waits[slots] = now.log_evidence, True
        for i in waits.nonzero().flatten().tolist():
            paid = log_weight(traces[i])
            traces[i], barrier = run(program, args, guide, known=traces[i], max_draws=1)
            log_weights[i] += log_weight(traces[i]) - paid
            waits[i] = barrier is not None and log_weights[i] > -math.inf
    return Posterior(traces, log_weights)


# --- 4. The guide: learn to draw from the posterior ----------------------------------------------
# The guide is the LM with a LoRA adapter; it shares the base's parameters, which stay as they are. Where
# q is the posterior, u = log R - log q is log Z for every trace. So the loss is the variance of u over
# traces of one input (VarGrad; Richter et al., 2020). It needs no estimate of log Z, and anyone may draw
# the traces: half are the guide's, and half the program's, lest the guide forget what it never draws.
class Guide:
    def __init__(self, lm, tell=lambda *args: "", rank=8):  # what it is told: the observations
        shared = {id(parameter): parameter for parameter in lm.model.parameters()}
        modules = copy.deepcopy(lm.model, shared)  # what is in this memo isn't copied
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear")
        self.lm, self.tell = LM(get_peft_model(modules, config), lm.tokenizer), tell

    def fit(self, program, inputs, steps, batch_size=16, lr=1e-2):  # inputs: tuples of arguments
        adapter = [p for p in self.lm.model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(adapter)
        for step in range(steps):
            args, u = inputs[step % len(inputs)], []
            for proposal in (self, None):
                for sites in importance(program, args, batch_size // 2, proposal).traces:
                    if log_weight(sites) > -math.inf:  # run it again, for the gradient of log q
                        known = {n: {k: s[k] for k in ("value", "log_p")} for n, s in sites.items()}
                        u.append(log_weight(run(program, args, self, known)[0]))
            assert len(u) > 1, f"fewer than two of {batch_size} traces have R > 0: draw more"
            loss = torch.stack(u).var()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(adapter, 1.0)
            optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
            optimizer.step()
            self.lm.memory.clear()  # it answers otherwise after the step


# --- 5. A program: two sentences of a story are missing, and we would like them short ------------
def story(lm, begin, middle, end, max_tokens):
    first = lm_sample("first", begin, lm=lm, max_tokens=max_tokens, stop=".")
    lm_sample("middle", [begin, first], lm=lm, obs=middle)
    second = lm_sample("second", [begin, first, middle], lm=lm, max_tokens=max_tokens, stop=".")
    lm_sample("end", [begin, first, middle, second], lm=lm, obs=end)
    factor("short", -0.1 * (len(first.token_ids) + len(second.token_ids)))


def tiny_lm(seed=0):  # a random Llama of four tokens, whose programs can be enumerated
    torch.manual_seed(seed)
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1, ".": 2, "<eos>": 3}))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 4}
    config = hf.LlamaConfig(**sizes, num_attention_heads=4, eos_token_id=3, initializer_range=0.2)
    return LM(hf.AutoModelForCausalLM.from_config(config), tokenizer)


def main():
    parser = argparse.ArgumentParser(description="Two missing sentences, by every engine.")
    parser.add_argument("--model", help="a Hugging Face causal LM or its folder; else a tiny one")
    name, found = parser.parse_args().model, {}
    if name:
        lm = LM(*(c.from_pretrained(name) for c in (hf.AutoModelForCausalLM, hf.AutoTokenizer)))
        texts = "Anna lost her keys.", " She opened the fridge.", " They lay beside the milk."
        args, num_samples, *training = (lm, *texts, 8), 8, 5, 4, 1e-3
    else:
        args, num_samples, *training = (tiny_lm(), "ab.", "ba.", "bb.", 3), 200, 60, 16, 1e-2
        found["exact"] = exact(story, args)
    guide = Guide(args[0], tell=lambda lm, begin, middle, end, max_tokens: [end, middle])
    guide.fit(story, [args], *training)  # steps, batch_size, lr
    for words, proposal in (("", None), (" with the guide", guide)):
        found["importance" + words] = importance(story, args, num_samples, proposal)
        found["smc" + words] = smc(story, args, num_samples, proposal)
    for engine, p in found.items():
        print(f"{engine:26}{p.log_evidence:8.3f} nats, ESS {p.ess:5.1f} {[*p.probs('first')][0]!r}")


if __name__ == "__main__":
    main()
