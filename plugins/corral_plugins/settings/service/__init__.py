"""The rules of settings: what is stored, what rules, and how every process hears of it."""
