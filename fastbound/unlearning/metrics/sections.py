"""The names in TOFU's aggregated log: its four sections, and one that we add."""

FORGET = "eval_log_forget.json"
RETAIN = "eval_log.json"
REAL_AUTHORS = "eval_real_author_wo_options.json"
WORLD_FACTS = "eval_real_world_wo_options.json"
# Every section of a log, with its name for display.
SECTIONS = {
    FORGET: "forget",
    RETAIN: "retain",
    REAL_AUTHORS: "real authors",
    WORLD_FACTS: "world facts",
}
MEMBERSHIP = "membership"  # attack -> side -> a score per row
