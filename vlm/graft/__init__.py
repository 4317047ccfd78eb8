"""The surgery: a vision-language donor's tower and a language donor become one model.

plan.py decides the fate of every tensor, tokenizer.py picks the tokenizer and its files,
stream.py carries the plan out, report.py accounts for it, verify.py proves it.
"""
