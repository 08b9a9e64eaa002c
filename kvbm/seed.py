"""What the first block's parent comes from; apart, so that who only passes it on does without numpy.

Every engine has to be given this as PYTHONHASHSEED: without it vLLM up to 0.26 takes random bytes, another prefix cache
in every process, and later versions a name of their own.
"""

from __future__ import annotations

SEED = "0"
