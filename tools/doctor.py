"""Doctor: which stage of a run is ill, why, and what to change. It trains nothing.

    python -m tools.doctor --out out              # a run: finished or not, of one stage, two, or three
    python -m tools.doctor --data my_folder       # the data alone, before anything is trained

One line a finding, in the order of the stages. The last line names the first stage that is ill and, in it,
the first cause, since what comes later may only follow from it.
"""
import argparse
from functools import cache
from pathlib import Path

from data import rules
from data.examples import open_data
from data.files import UserError
from lib.checkpoint import load, load_tokenizer
from lib.fast import prepare
from lib.flags import one_sentence, pick_device
from lib.output import make_harmless
from lib.rewards import load_reward_model
from model import GPT
from tools import doctor_files as files
from tools.doctor_files import Finding, sample
from tools.doctor_logs import ppo_findings, read_log, unfinished_finding
from tools.doctor_models import SOME, Case, rm_findings, sft_findings

TITLES = {"sft": "SFT", "rm": "reward model", "ppo": "PPO"}


def examine(out, given, logs, device):
    """Yields (stage, Finding), in order. given: a folder of data, or None: the one of each stage."""
    new = max(getattr(log.config, "max_new_tokens", None) or 0 for log in logs.values())

    @cache
    def read(where, *flags):  # once, where several stages have the same
        folder, world = open_data(where)
        return world, *files.read_data(folder, *flags)

    for stage, name in files.NAMES.items():
        if stage in logs:
            cfg = logs[stage].config
            world, data, trouble = read(given or cfg.data, cfg.skip_bad, cfg.val_fraction)
            yield from ((stage, finding) for finding in files.data_findings(data, trouble, name))
            try:
                for finding in (ppo_findings(logs[stage], out) if stage == "ppo" else
                                networks(stage, out, data, world, logs, device, new)):
                    yield stage, finding
            except UserError as error:
                yield stage, Finding(f"not examined: {error}")


def networks(stage, out, data, world, logs, device, new):
    """Findings of SFT or of the reward model, from the checkpoints that the latest stages read or made."""
    def path(name, stages):
        paths = [Path(getattr(logs[x].config, name, "") or out / f"{name}.pt") for x in stages if x in logs]
        return next((path for path in paths if path.exists()), None)

    if logs[stage].running:
        yield unfinished_finding(logs[stage])
        return
    sft, rm = path("sft", ("ppo", "rm", "sft")), path("rm", ("ppo", "rm"))
    needed = {"sft.pt": sft, **({"rm.pt": rm} if stage == "rm" else {}),
              f"{files.NAMES[stage]}.jsonl": files.NAMES[stage] in data}
    if lost := [name for name, there in needed.items() if not there]:
        yield Finding(f"not examined: {' and '.join(lost)} not found")
        return
    gpt = prepare(load(GPT, sft), device)
    tokenizer, room = load_tokenizer(sft), gpt.config.block_size
    scorer = prepare(load_reward_model(rm, gpt, tokenizer), device) if stage == "rm" else None
    shown = sample(data["sft"][0], SOME) if "sft" in data and not new else []
    new = new or rules.max_new_tokens(room, [len(tokenizer.encode(text)) + 1 for _, text in shown])
    case = Case(gpt, scorer, tokenizer, data, world, device, min(new, room - 1))
    yield from sft_findings(case, logs["sft"]) if stage == "sft" else rm_findings(case, logs["rm"])


def show(found):
    """Print (stage, Finding)s as they come; returns the first that is an illness, or None."""
    first = shown = None
    for stage, finding in found:
        if stage != shown:
            print(TITLES[stage])
        shown = stage
        print(f"  ILL  {finding.text}: {finding.cause}" if finding.ill else f"  ok   {finding.text}",
              flush=True)
        first = first or (finding.ill and (stage, finding))
    return first


def main(args):
    device = pick_device(args.device)
    logs = {stage: log for stage in TITLES if args.out and (log := read_log(args.out, stage))}
    if args.out and not logs:
        raise UserError(f"{args.out}: neither sft.log.jsonl nor rm.log.jsonl nor ppo.log.jsonl is there")
    ill = show(examine(args.out, args.data, logs, device) if logs else
               files.folder_findings(open_data(args.data)[0]))
    print("verdict: " + (f"{TITLES[ill[0]]} is ill: {ill[1].cause}. What to do: {ill[1].change}" if ill else
                         "nothing is ill in what was examined"))


def read_args():
    parser = argparse.ArgumentParser(prog="python -m tools.doctor", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the folder of a run")
    parser.add_argument("--data", help="a folder of data (default: the one that each stage was trained on)")
    parser.add_argument("--device", default="auto", help='"cuda", "mps" or "cpu"')
    args = parser.parse_args()
    if not (args.out or args.data):
        parser.error("give --out, --data, or both")
    return args


if __name__ == "__main__":
    make_harmless()
    arguments = read_args()
    with one_sentence("tools.doctor", "Try --device cpu"):
        main(arguments)
