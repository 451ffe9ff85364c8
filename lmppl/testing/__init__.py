"""For tests of programs and engines: tiny language models, and the exact answer.

```python
from lmppl.testing import enumerate_program, tiny_lm, total_variation

lm = tiny_lm("ab.", seed=1)
exact = enumerate_program(program, "a", lm=lm)
posterior = lmppl.infer(program, "a", lm=lm, method="importance", num_samples=1000)
assert total_variation(exact.posterior("z", text=True), posterior.probs("z")) < 0.1
```
"""

from lmppl.testing.distances import iid_tv_floor, total_variation
from lmppl.testing.guides import GuideReport, guide_log_probs, guide_report
from lmppl.testing.languages import ConstrainedSite, Language
from lmppl.testing.naive import enumerate_site, naive_log_prob
from lmppl.testing.oracle import Enumeration, ExactTrace, enumerate_program, key, trace_values
from lmppl.testing.quadrature import quadrature_nodes
from lmppl.testing.tiny import tiny_byte_lm, tiny_lm, tiny_model, tiny_tokenizer

__all__ = [
    "ConstrainedSite", "Enumeration", "ExactTrace", "GuideReport", "Language", "enumerate_program",
    "enumerate_site", "guide_log_probs", "guide_report", "iid_tv_floor", "key", "naive_log_prob",
    "quadrature_nodes", "tiny_byte_lm", "tiny_lm", "tiny_model", "tiny_tokenizer",
    "total_variation", "trace_values",
]  # fmt: skip
