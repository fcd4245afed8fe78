"""Makes one-line mistakes in the six files, one at a time, and prints those that no test notices: none may.

    python tests/mutants.py [--jobs 2] [--only WORD]                      by hand; some hours on 2 cores

A mutant is a file's words and what stands there instead. "*" is every script that has the words: what the
scripts share would otherwise be caught by the test that holds it byte-identical, and not by what it means.
For the same reason test_shared.py and test_readme.py, which look at the text, are left out. A mutant meets
the quick tests of its own file and of the wiring first, then the other quick ones, then those of several
processes, then the long ones of resumption.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SCRIPTS = ["sft", "dpo", "reward_model", "ppo", "grpo"]
TEXTUAL = {"test_shared.py", "test_readme.py"}
MUTANTS = [  # of each: the file, its words, what stands there instead
    # what all scripts share
    ("*", 'getattr(head, "bias", None)', "None"),
    ("*", "hidden[b, t - 1], input_ids[b, t]", "hidden[b, t], input_ids[b, t]"),
    ("*", "zeros.index_put((b, t), x)", "zeros.index_put((b, t - 1), x)"),
    ("*", "self.scale / temperature, getattr", "self.scale, getattr"),
    ("*", "self.scale / temperature, getattr", "1 / temperature, getattr"),
    ("*", "self.cap and self.cap / temperature", "self.cap"),
    ("*", "dz *= 1 - (z / cap).square_()", "pass"),
    ("*", "d_bias += dz.float().sum(0)", "d_bias += 0 * dz.float().sum(0)"),
    ("*", "squeeze(-1) - total.log()", "squeeze(-1)"),
    ("*", "- z.clamp_(min=-1e30).mul_(p).sum(-1) / total", "- 0 * z.clamp_(min=-1e30).mul_(p).sum(-1)"),
    ("*", "(place == targets[n])", "(z.amax(-1) == z.gather(-1, targets[n, None])[:, 0])"),
    ("*", "if bias is None else bias * factor", ""),
    ("common", "lambda x: x[..., :1] * told", "lambda x: 1 * told"),
    ("*", "lr=args.learning_rate, fused=True)", "lr=args.learning_rate, betas=(0.9, 0.95), fused=True)"),
    ("*", "lr=args.learning_rate, fused=True)", "lr=args.learning_rate, eps=1e-6, fused=True)"),
    ("*", 'p.ndim < 2], "weight_decay": 0.0}', 'p.ndim < 2], "weight_decay": args.weight_decay}'),
    ("*", 'p.ndim >= 2], "weight_decay": args.weight_decay}', 'p.ndim >= 2], "weight_decay": 0.01}'),
    ("*", "args.learning_rate * (step + 1)", "args.learning_rate * step"),
    ("*", '"linear": 1 - done', '"linear": 1 - done / 2'),
    ("*", "0.5 * (1 + math.cos(math.pi * done))", "1 - done"),
    ("*", "optimizer.zero_grad()", "pass"),
    ("*", "(decoder.logits.float() / temperature).log_softmax(-1)",
     "decoder.logits.float().log_softmax(-1)"),
    ("*", "uniforms[rows, t]", "uniforms[:len(rows), t]"),
    ("*", 'stream(seed, "sample", step, first * G + place)', 'stream(seed, "sample", first * G + place)'),
    ("*", 'stream(args.seed, "minibatch", number, iteration)', 'stream(args.seed, "minibatch", number)'),
    ("*", "else weighted.nansum()", "else value.nansum()"),
    ("*", "reward.weight or math.nan for", "reward.weight for"),
    ("*", "completion[-1] not in stop_ids", "False"),
    ("*", "mask, logprobs = mb.mask * mb.sampled, mb.logprobs * mb.sampled",
     "mask, logprobs = mb.mask, mb.logprobs"),
    ("common", "target.clamp(min=0).minimum(ends[:, -1:] * (1 - 2**-40))", "target"),
    ("common", "torch.searchsorted(ends, target, right=True)", "torch.searchsorted(ends, target)"),
    ("common", "target - (ends - weights).gather(-1, place)", "target - ends.gather(-1, place)"),
    ("common", "self.lengths[self.rows] += self.going[self.rows]", "self.lengths[self.rows] += 1"),
    ("common", "> self.at.place - window)", ">= self.at.place - window)"),
    ("common", "(*of_layers, self.position, self.seen)", "(*of_layers, self.position)"),
    ("common", "tokens, self.rows = tokens[kept], self.rows[kept]", "tokens = tokens[kept]"),
    ("common", "key = len(tokens), self.at.width", "self.at.width, key = self.WIDTH, (len(tokens), 0)"),
    ("common", 'attention_mask=mask, past_key_values=prompts,', 'attention_mask=None, past_key_values=prompts,'),
    # sft
    ("sft", "args.max_grad_norm or math.inf", "math.inf"),
    ("sft", "share = mb.loss / trained_tokens", "share = mb.loss / mb.mask.sum()"),
    ("sft", "run.accelerator.backward(share.sum() * processes)", "run.accelerator.backward(share.sum())"),
    ("sft", "learning_rate_at(run.step, total_steps, args)",
     "learning_rate_at(run.step, total_steps, args) * processes"),
    ("sft", "learning_rate_at(run.step, total_steps, args)",
     "learning_rate_at(run.step + 1, total_steps, args)"),
    ("sft", "fgm_delta(delta.grad, embeddings, real_tokens(mb), args.adversarial_epsilon)",
     "fgm_delta(delta.grad, embeddings, real_tokens(mb), 0.1)"),
    ("sft", "real_tokens(mb), args.neftune_noise_alpha)", "real_tokens(mb), 5.0)"),
    ("sft", "fgm_delta(gradient, embeddings, real_tokens(mb), args.adversarial_epsilon)",
     "fgm_delta(gradient, embeddings, real_tokens(mb), 0.1)"),
    ("sft", '"neftune", key, place)', '"neftune", key)'),
    ("sft", "common.encode_sft(tokenizer, conversation, args.completion_only_loss)",
     "common.encode_sft(tokenizer, conversation)"),
    ("sft", "int(round(share * len(blocks), 6))", "round(share * len(blocks))"),
    ("sft", 'metrics["eval/loss"] < run.state["best_loss"]', 'metrics["eval/loss"] < math.inf'),
    ("sft", 'args, "eval")', "args, run.step)"),
    ("sft", "run.step, args.batch_size, args.seed)", "run.step, args.batch_size, 0)"),
    # dpo
    ("dpo", "args.max_grad_norm or math.inf", "math.inf"),
    ("dpo", 'scale = lengths if args.loss_type == "ipo" else 1', "scale = 1"),
    ("dpo", "args.beta, args.loss_type, args.label_smoothing)\n    nll",
     "args.beta, args.loss_type)\n    nll"),
    ("dpo", "args.beta, args.loss_type, args.label_smoothing)\n    nll",
     "0.1, args.loss_type, args.label_smoothing)\n    nll"),
    ("dpo", "losses + args.sft_coef * nll", "losses + nll"),
    ("dpo", "nll = -sums[0] / lengths[0]", "nll = -sums[0]"),
    ("dpo", "args.beta * (sums.detach() - ref_sums)", "sums.detach() - ref_sums"),
    ("dpo", "(margins - 1 / (2 * beta)).square()", "(margins - 1 / beta).square()"),
    ("dpo", "run.accelerator.backward(loss * run.accelerator.num_processes)",
     "run.accelerator.backward(loss)"),
    ("dpo", "learning_rate = learning_rate_at(step, ",
     "learning_rate = run.accelerator.num_processes * learning_rate_at(step, "),
    ("dpo", "ends, 0, 0, 0, args.beta, args.loss_type, args.label_smoothing",
     "ends, 0, 0, 0, args.beta, args.loss_type"),
    ("dpo", "shares[:B] -= args.sft_coef * mb", "shares[:B] -= mb"),
    # reward_model
    ("reward_model", "args.max_grad_norm or math.inf", "math.inf"),
    ("reward_model", "margin, args.center_rewards_coefficient)", "margin)"),
    ("reward_model", 'margin=pair["margin"]', "margin=0.0"),
    ("reward_model", "chosen_scores - rejected_scores - margin)", "chosen_scores - rejected_scores)"),
    ("reward_model", "losses / sides / len(groups)", "losses / sides / len(mb.places or [0])"),
    ("reward_model", "(difference > 0) / len(groups)", "(difference >= 0) / len(groups)"),
    ("reward_model", "run.accelerator.backward(share.sum() * run.accelerator.num_processes)",
     "run.accelerator.backward(share.sum())"),
    ("reward_model", '["lr"] = learning_rate_at(',
     '["lr"] = run.accelerator.num_processes * learning_rate_at('),
    ("reward_model", "mask[-1] = 1", "mask[-2] = 1"),
    ("reward_model", "[scores[name] for name in names]", "list(scores.values())"),
    # ppo
    ("ppo", "args.max_grad_norm or math.inf", "math.inf"),
    ("ppo", "mb.truncated, args.score_clip, args.missing_eos_penalty)",
     "mb.truncated, None, args.missing_eos_penalty)"),
    ("ppo", "mb.truncated, args.score_clip, args.missing_eos_penalty)", "mb.truncated, args.score_clip)"),
    ("ppo", "mb.mask, args.gamma, args.gae_lambda)", "mb.mask, 1.0, args.gae_lambda)"),
    ("ppo", "mb.mask, args.gamma, args.gae_lambda)", "mb.mask, args.gamma)"),
    ("ppo", "mb.advantages, args.epsilon)", "mb.advantages)"),
    ("ppo", "mb.returns, args.value_clip)", "mb.returns)"),
    ("ppo", "args.vf_coef * mb.value_loss) +", "0.1 * mb.value_loss) +"),
    ("ppo", "+ args.sft_coef * nll", "+ nll"),
    ("ppo", "whiten(raw, mb.mask)", "raw"),
    ("ppo", 'add_advantages(rows, args, run.state["kl_coef"])', "add_advantages(rows, args, args.kl_coef)"),
    ("ppo", 'seen["kl_sequence"], args.kl_target)', 'seen["kl"], args.kl_target)'),
    ("ppo", "args.max_completion_length, args.temperature, stop_ids, G)",
     "args.max_completion_length, 1.0, stop_ids, G)"),
    ("ppo", '("old_logprobs", "values"), args.temperature)', '("old_logprobs", "values"), 1.0)'),
    ("ppo", 'Policy(reference), ("ref_logprobs",), args.temperature)',
     'Policy(reference), ("ref_logprobs",), 1.0)'),
    ("ppo", "policy(mb.input_ids, mb.mask, args.temperature)", "policy(mb.input_ids, mb.mask)"),
    ("ppo", "values = values.roll(1, 1)", "values = values.roll(0, dims=1)"),
    ("ppo", "make_value_head(start.weight * row)", "make_value_head(row)"),
    ("ppo", "correction=min(1, len(known) - 1))", "correction=0)"),
    ("ppo", "torch.maximum(-advantages * ratio", "torch.minimum(-advantages * ratio"),
    ("ppo", "0.5 * torch.maximum(error, clipped)", "0.5 * error"),
    ("ppo", "step * count, count, len(demonstrations)", "0, count, len(demonstrations)"),
    ("ppo", "run.step, run.total_steps, args)",
     "run.step, run.total_steps, args) * run.accelerator.num_processes"),
    # grpo
    ("grpo", "args.max_grad_norm or math.inf", "math.inf"),
    ("grpo", "args.epsilon,\n", "0.2,\n"),
    ("grpo", "args.epsilon_high, args.importance_sampling_level)", "0.2, args.importance_sampling_level)"),
    ("grpo", "args.epsilon_high, args.importance_sampling_level)", "args.epsilon_high)"),
    ("grpo", "args.kl_coef * (logprobs - mb.old_logprobs).exp() * shown", "args.kl_coef * shown"),
    ("grpo", "args.kl_coef * (logprobs - mb.old_logprobs).exp() * shown",
     "args.kl_coef * (logprobs - mb.old_logprobs).exp().detach() * shown"),
    ("grpo", "args.kl_coef * (logprobs", "0.1 * (logprobs"),
    ("grpo", "+ args.sft_coef * nll", "+ 0.1 * nll"),
    ("grpo", "lengths, args.loss_type, args.max_completion_length)",
     'lengths, "dapo", args.max_completion_length)'),
    ("grpo", "lengths, args.loss_type, args.max_completion_length)", "lengths, args.loss_type, 512)"),
    ("grpo", "group_advantages(scores, args.scale_rewards)", "group_advantages(scores)"),
    ("grpo", "best_of_groups(scores, args.best_fraction)",
     "best_of_groups(scores, 0.5 * bool(args.best_fraction))"),
    ("grpo", "length, args.max_completion_length, args.overlong_penalty)",
     "length, args.max_completion_length, 0)"),
    ("grpo", 'args.mask_truncated_completions and row["truncated"]', "False"),
    ("grpo", "policy(mb.input_ids, mb.mask, args.temperature)", "policy(mb.input_ids, mb.mask)"),
    ("grpo", "args.max_completion_length, args.temperature, stop_ids, G)",
     "args.max_completion_length, 1.0, stop_ids, G)"),
    ("grpo", 'policy, ("old_logprobs",), args.temperature)', 'policy, ("old_logprobs",), 1.0)'),
    ("grpo", 'Policy(reference), ("ref_logprobs",), args.temperature)',
     'Policy(reference), ("ref_logprobs",), 1.0)'),
    ("grpo", "(known.sum(1, keepdim=True) - 1).clamp(min=1)", "known.sum(1, keepdim=True)"),
    ("grpo", "torch.minimum(ratio * advantage, clipped * advantage)", "clipped * advantage"),
    ("grpo", 'nll_tokens = sum(int(row["mask"].sum()) for row in rows if row["nll"])',
     'nll_tokens = sum(int(row["mask"].sum()) for row in rows)'),
    ("grpo", "return d.expm1() - d", "return d.square() / 2"),
    ("grpo", "passed <= threshold", "passed < threshold"),
    ("grpo", 'run.state["draws"], args.batch_size', "run.step, args.batch_size"),
    ("grpo", "run.accelerator.backward(share.sum() * run.accelerator.num_processes)",
     "run.accelerator.backward(share.sum())"),
    ("grpo", "run.step, run.total_steps, args)",
     "run.step, run.total_steps, args) * run.accelerator.num_processes"),
    ("grpo", "args.seed, first=len(sampled))", "args.seed, first=0)"),
    ("grpo", "if updates > 1 and not args.rollout_lag:", "if updates > 1:"),
    ("grpo", "if updates == 1 and not args.rollout_lag:", "if updates == 1:"),
    ("common", "part.copy_(p.detach().flatten())", "pass"),
    ("common", "self.begin((number + 1) * self.updates)", "self.begin(number * self.updates)"),
    ("common", 'self.run.state["draws"] = draws', "pass"),
    # common
    ("common", "key=lambda key: hashlib.sha256(key.encode()).digest())",
     "key=lambda p: hashlib.sha256(p.encode()).digest(), reverse=True)"),
    ("common", "mask[:1] = 0\n", "\n"),
    ("common", "position = (mask.cumsum(-1) - 1).clamp(min=0)",
     "position = torch.arange(mask.shape[1], device=device).expand_as(mask)"),
    ("common", "self.position = self.position + 1", "self.position = self.position + 0"),
    ("common", "generator=stream(seed, name, epoch))", "generator=stream(seed, name, 0))"),
    ("common", "answer - max_length // 2))", "answer))"),
    ("common", "mask[first:stop] = [1] * (stop - first)", "mask[first:stop - 1] = [1] * (stop - 1 - first)"),
    ("common", "first, last = bisect_left(starts, start), bisect_right(ends, end)",
     "first, last = bisect_left(starts, start) - 1, bisect_right(ends, end)"),
    ("common", "setattr(module, name, 0.0)", "pass"),
    ("common", "return model, model.disable_adapter", "return model, nullcontext"),
    ("common", "else total[name] / max(tokens, 1)", "else total[name] / max(tokens - 1, 1)"),
    ("common", "parts | {name: torch.where(mask.bool(), x, 0.0)}", "parts | {name: x}"),
    ("common", "sorted(ids - {None})", "[tokenizer.eos_token_id]"),
    ("common", 'counts["duplicates dropped"] += len(items) - len(unique)\n',
     'counts["duplicates dropped"] += 0\n'),
    ("common", '["step"] > step:', '["step"] > step + 1:'),
    ("common", "    use_scoring_pad_token(tokenizer)\n    config.update", "    config.update"),
    ("common", "owner.base_model if trunk is None else trunk)", "owner.base_model)"),
    ("common", 'getattr(self.args, "value_model", None),', "None,"),
    ("common", "kept = kept_part(len(whole), start, max_length)",
     "kept = kept_part(len(whole), mask.index(1), max_length)"),
    ("common", "for message in messages[:asked]:", "for message in messages[:1]:"),
    ("common", "self.stop |= self.signal > 0 and self.step < self.total_steps", "pass"),
    ("common", "require(not steps_in(folder) or args.overwrite_output_dir, ", "require(True, "),
    ("common", "shutil.rmtree(later)", "pass"),
    ("common", "len(os.sched_getaffinity(0)), int", "os.cpu_count(), int"),
    ("common", "math.ceil(round(an_epoch * args.num_train_epochs, 6))",
     "math.ceil(an_epoch * args.num_train_epochs)"),
    ("*", 'stream(args.seed, "rewards", step, first, process)', 'stream(args.seed, "rewards", step, process)'),
    ("ppo", '{"entropy": entropy}, mb.mask * mb.sampled)', '{"entropy": entropy}, mb.mask)'),
    ("grpo", "[], [], [], min(args.batch_size, len(train))", "[], [], [], args.batch_size"),
    ("grpo", "logged.append(log)", "logged = [log]"),
    ("dpo", "< 1e-4 * args.beta", "< 1e-4"),
    ("sft", '1 if args.adversarial == "fgm" and', "1 if args.adversarial and"),
    ("sft", "if args.warmup_steps < 1 else 1), 6)", "if args.warmup_steps < 1 else 1), 20)"),
    ("sft", "int(round(share * len(blocks), 6))", "int(share * len(blocks))"),
    ("common", "self.max_steps == -1 or self.max_steps > 0", "True"),
    ("common", "if file is None:", "if file != args.dataset_name:"),
    ("common", "held or not args.eval_dataset_name,", "True,"),
    ("common", """f'dtype="{dtype}"'] if adapter""", "] if adapter"),
    ("common", "bnb_4bit_compute_dtype='{dtype}')", ")"),
    ("common", "while ids[-1] not in $stops:", "while False:"),
    ("common", 'not moved or args.resume_from_checkpoint != "latest"', "True"),
    ("common", "require(not frozen,", "require(True,"),
    ("common", "args.num_minibatches <= completions", "True"),
    ("common", "scores or \"ForSequenceClassification\" not in", "True or \"\" in"),
    ("common", "require(scores or not of_scores,", "require(True,"),
    ("common", "grad_norm == 0 and loss != 0", "False"),
    ("common", 'if "output_dir" in args.typed:', "if False:"),
    ("common", "if isinstance(p, torch.nn.Parameter) and not p.is_meta", "if p in set(module.parameters())"),
    ("*", "model.train(not any(common.dropout_rates(model)))", "model.eval()"),
    ("common", "if model.config.pad_token_id is None:", "if tokenizer.pad_token_id is None:"),
    ("common", "pad([rows[i] for i in at], model.config.pad_token_id)", "pad([rows[i] for i in at], tokenizer.pad_token_id)"),
    ("common", 'filterwarnings("error", message="Found missing', 'filterwarnings("ignore", message="Found missing'),
    ("common", "pissa|olora|corda|loftq|lora_ga", "never"),
    ("common", "if path.endswith(name) and not", "if False and not"),
    ("common", 'hasattr(layer, "batch_repeat_interleave")', "True"),
    ("common", '"<think>" * begun + text_of(c)', "text_of(c)"),
    ("common", 'rstrip().endswith("<think>")', 'endswith("<think>")'),
    ("common", r"|\}\s*\{", ""),
    ("common", "            if lack:", "            if False:"),
    ("common", "require(not chosen or chosen in fitting,", "require(True,"),
    ("common", ', patch.object(transformers.GenerationConfig, "validate"):', ":"),
    ("*", "model(input_ids=ids[:, :-1], use_cache=False).logits", "model(input_ids=ids, use_cache=False).logits[:, :-1]"),
    ("common", 'if rope.get("rope_type") == "longrope" else None', "if None else None"),
    ("common", "tokenizer.clean_up_tokenization_spaces = False", "pass"),
    ("common", '("DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG")', '("DEEPSPEED", "MEGATRON_LM")'),
    ("common", r"\d['\x22]?,\s", r"\d,\s"),
    ("common", "{{% if {name} is not defined %}}{{% set", "{{% if true %}}{{% set"),
    ("common", '{**tokenizer.chat_template, "default": template} if named else template', "template"),
    ("common", "ids[:1] + ids[part][1:]", "ids[part]"),
    ("common", "return ids[:1] + ids[-max_length:][1:]", "return ids[-max_length:]"),
    ("common", 'if loaded["unexpected_keys"] and not scores:', "if False:"),
    ("common", 'if ids != tokenizer(text, add_special_tokens=False)["input_ids"]:', "if False:"),
    ("common", "model.score if scores else after_head(model)", "None if scores else after_head(model)"),
    ("common", "require(len({*names}) == len(names),", "require(True,"),
    ("common", 'require(math.isfinite(metrics.get("eval/loss", 0.0)),', "require(True,"),
    ("common", 'lambda text: parsed(text) if re.match(r"\\s*[\\[{]", text) else [text])', "lambda text: [text])"),
    ("common", '(r"(?![\\d．百千万萬億亿])[', '(r"(?!.)['),
    ("common", "messages, check=lambda *_: None)[-1]", "messages)[-1]"),
    ("common", "values = LOOP.run_until_complete(values)", "values = asyncio.run(values)"),
    ("common", 'theirs.get(n) == value for n, value', "True for n, value"),
    ("common", "require(then.keys() == asdict(args).keys(),", "require(True,"),
    ("common", "if scores:  # an adapter brings", "if scores and args.adapter:  # an adapter brings"),
    ("grpo", "metrics = logged | common.rollout_metrics(rows, rewards)", "metrics = common.rollout_metrics(rows, rewards) | logged"),
    ("ppo", "figures = logged | common.rollout_metrics(rows, rewards)", "figures = common.rollout_metrics(rows, rewards) | logged"),
    ("ppo", "model.get_output_embeddings().weight[:1] * 0", "torch.zeros(1, model.config.hidden_size)"),
    ("common", 'require(not a_run,', "require(True,"),
    ("common", 'require(last == "user",', 'require(last != "assistant",'),
    ("common", "        self.bar.close()\n", "        self.bar.close()\n        self.track and self.accelerator.end_training()\n"),
    ("common", 'self._negative_number_matcher = ', "matcher = "),
    ("common", 'here if name != "system_prompt" else "$HERE"', "here"),
    ("common", 'project_dir=os.path.join(args.output_dir, "tracker")', "project_dir=args.output_dir"),
    ("common", '{"purge_step": self.step + 1}', '{"purge_step": self.step}'),
    ("common", '.removesuffix(tokenizer.eos_token))["input_ids"]', ')["input_ids"]'),
    # what test_numbers.py is for
    ("grpo", "weigh(chosen, args)", "weigh(rows, args)"),
    ("ppo", 'chosen = weighed([rows[i] for i in order[minibatch::args.num_minibatches]], "weight")',
     'whole = weighed(rows, "weight")\n            chosen = [whole[i] for i in order[minibatch::args.num_minibatches]]'),
    ("grpo", 'rows = [row for row in common.flat(groups) if not math.isnan(row["score"])]\n', "rows = common.flat(groups)\n"),
    ("grpo", "count = math.ceil(round(fraction * scores.shape[1], 9))", "count = int(round(fraction * scores.shape[1], 9))"),
    ("common", "lora_alpha=args.lora_alpha,", "lora_alpha=2 * args.lora_r,"),
    ("common", 'lora_dropout=getattr(args, "lora_dropout", 0.0)', "lora_dropout=0.0"),
    ("reward_model", "run.device, dropout=True, score_names", "run.device, score_names"),
    ("sft", "run.device, dropout=True)", "run.device)"),
    ("common", "set_seed(args.seed)  # random weights", "set_seed(0)  # random weights"),
    ("grpo", "num_generations=args.num_generations, seed=args.seed, first", "num_generations=args.num_generations, seed=0, first"),
    ("ppo", "args, run, args.num_generations, args.seed)", "args, run, args.num_generations, 0)"),
    ("ppo", 'len(demonstrations), args.seed, "sft")', 'len(demonstrations), 0, "sft")'),
    ("sft", 'stream(args.seed, "neftune", key, place)', 'stream(0, "neftune", key, place)'),
    ("sft", 'stream(args.seed, "dropout", run.step, process)', 'stream(args.seed, "dropout", process)'),
    ("reward_model", 'stream(args.seed, "dropout", step, run.place[0])', 'stream(args.seed, "dropout", step)'),
    ("common", 'left_out = {"assistant"} if system else', 'left_out = {"assistant", "system"} if system else'),
    ("dpo", "(1e-5 if lora else 1e-6)", "(1e-6 if lora else 1e-5)"),
    ("sft", '        run.state["best_loss"] = math.inf\n\n', "        pass\n\n"),
    ("sft", 'conversation["messages"][:-1], args.max_length)', 'conversation["messages"][:-1])'),
    ("reward_model", 'conversation["messages"])[-1])', 'conversation["messages"])[0])'),
    ("common", "stop_ids = stop_token_ids(tokenizer, model.generation_config)\n    lengths", "stop_ids = stop_token_ids(tokenizer)\n    lengths"),
    ("sft", "    model.eval()\n    # evaluation mode has", "    # evaluation mode has"),
    ("ppo", "groups, logged = rollout(model, held, rewards, args, run)", "groups, logged = rollout(model, held, rewards, args, run, seed=args.seed)"),
    ("sft", '"eval/token_accuracy": hits / tokens', '"eval/token_accuracy": (sums[:, 2] / sums[:, 3]).mean().item()'),
    ("common", "hit = is_right(text, completion[-1] not in stop_ids, answer)", "hit = is_right(text, False, answer)"),
    ("common", '{"accuracy": sum(matches) / len(matches)}', '{"accuracy": sum(matches) / len(rows)}'),
    ("common", "group[s[:k].argmax()]", "group[s.argmax()]"),
    ("common", "[vote(group[:k]) for group in answers]", "[vote(group) for group in answers]"),
    ("common", "s[:k].softmax(0).tolist())", "s[:k].tolist())"),
    ("grpo", "reward.weight if reward.score else 0.0", "1.0 if reward.score else 0.0"),
    ("reward_model", "((confidence - 0.5) * 2 * bins)", "(confidence * bins)"),
    ("ppo", "(kl.sum() / mb.mask.sum()).item()", "kl.mean().item()"),
    ("ppo", '"rlhf_reward": token_rewards.sum(-1).mean().item()', '"rlhf_reward": scores.mean().item()'),
    ("ppo", "for x in (raw, returns))", 'for x in (fields["advantages"], returns))'),
    ("ppo", "scores.std(correction=0).item()", "scores.std().item()"),
    ("ppo", 'f"score {scores[i].item():.4g}, "', 'f"score {row[\'score\']:.4g}, "'),
    ("grpo", "group[~group.isnan()].std().item()", "group[~group.isnan()].std(correction=0).item()"),
    ("common", "known.std().item() if len(known) > 1", "known.std(correction=0).item() if len(known) > 1"),
    ("common", "for row in rows]).nanmean().item()", "for row in rows]).nan_to_num().mean().item()"),
    ("grpo", 'best = [len(row["completion_ids"])', 'best = [len(row["input_ids"])'),
    ("grpo", "is_best.item() and kept", "is_best.item()"),
    ("grpo", 'metrics.get("kl", 0.0) * length', 'metrics.get("kl", 0.0)'),
    ("dpo", '0.2 * (metrics["eval/logps/chosen"] - moved)', '0.2 * metrics["eval/logps/chosen"]'),
    ("common", "losses == sorted(set(losses))", "losses == sorted(losses)"),
    ("reward_model", "at_last_token(scores.T.flatten(), mb.mask)", "at_last_token(scores.flatten(), mb.mask)"),
    ("dpo", '"ref_logprobs": mb.ref_logprobs, "reward"', '"ref_logprobs": mb.logprobs, "reward"'),
    ("common", 'columns["clip_ratio/high_mean"].float()\n                             - columns["clip_ratio/low_mean"].float()',
     'columns["clip_ratio/low_mean"].float()\n                             - columns["clip_ratio/high_mean"].float()'),
    ("common", '"values": "old value", "new_values": "value"', '"values": "value", "new_values": "old value"'),
    ("grpo", "groups, logged = complete(held)", "groups, logged = complete(held, seed=args.seed)"),
    ("grpo", "seed=args.seed + 1)", "seed=args.seed)"),
    ("ppo", "            extra = nll_rows(demonstrations, run.step",
     '            own = common.pad_rows(chosen, ("advantages",), "cpu")\n            for row, a in zip(chosen, whiten(own.advantages, own.mask)):\n                row["advantages"] = a[:len(row["input_ids"])]\n            extra = nll_rows(demonstrations, run.step'),
    ("*", "tokenizer.decode([i for i in completion if i not in stop_ids])", "tokenizer.decode(completion, skip_special_tokens=True)"),
    ("common", "tokenizer.decode([t for t in completion if t not in stop_ids])", "tokenizer.decode(completion, skip_special_tokens=True)"),
    ("common", "* bool(adapter and not scores),", "* 0,"),
    ("common", 'if no_end or hasattr(config, "scored_at"):', "if True:"),
    ("common", "except ValueError:  # some templates", "except KeyError:  # some templates"),
    ("common", 'require(not more, f"it brings', 'require(True, f"it brings'),
    ("common", "return None if spoilt else", "return None if factorial else"),
    ("common", "if min(Counter(keys).values()) > wanted:", "if True:"),
    ("common", "if min(Counter(keys).values()) > wanted:", "if False:"),
    ("common", "encode(part, one_file or part)", "encode(part, part)"),
    ("common", 'if "py" in name.lower()]', "if False]"),
    ("ppo", "learning_rate_at(run.step, run.total_steps, args)", "learning_rate_at(number * updates, run.total_steps, args)"),
    ("grpo", "learning_rate_at(run.step, run.total_steps, args)", "learning_rate_at(number * updates, run.total_steps, args)"),
    ("ppo", 'sum(len(row["input_ids"]) for row in chosen), SHOWN)', 'sum(len(row["input_ids"]) for row in rows), SHOWN)'),
    ("grpo", 'sum(len(row["input_ids"]) for row in chosen), SHOWN)', 'sum(len(row["input_ids"]) for row in rows), SHOWN)'),
    ("ppo", "replace(args, format=None), tokenizer,", "args, tokenizer,"),
    ("grpo", ".double().nanmean().item()\n    return [demonstration", ".double().mean().item()\n    return [demonstration"),
    ("grpo", 'figures["reward_std"] = sum(stds) / len(scores)', 'figures["reward_std"] = sum(stds) / max(1, len(stds))'),
    ("common", "answer_start = bisect_left(starts, spans[0][0])", "answer_start = bisect_left(starts, spans[-1][0])"),
    ("common", 'longest = max(len(side["mask"]) for side in sides)', 'longest = len(sides[0]["mask"])'),
    ("common", 'if len(part["input_ids"]) <= longest:', 'if len(part["input_ids"]) < longest:'),
    ("common", 'for name in ("accuracy", "code") if name in names), 0)', 'for name in ("code", "accuracy") if name in names), 0)'),
    ("common", 'value in (1, "1", "1.0")', 'value in (1, "1")'),
    ("common", 'WEIGHTS = {"weight", "train", "training", "loss"}', 'WEIGHTS = {"weight", "train", "loss"}'),
    ("common", "lines = enumerate(map(bytes.strip, file), 1)", "lines = enumerate(filter(None, map(bytes.strip, file)), 1)"),
    ("common", "both = sum(prompt_key(prompt_of(converted)) in trained for converted, _, _ in held)",
     "both = len({prompt_key(prompt_of(converted)) for converted, _, _ in held} & trained)"),
    ("common", 'lengths = [len(group) * max(len(row["input_ids"]) for row in group) for group in groups]',
     'lengths = [sum(len(row["input_ids"]) for row in group) for group in groups]'),
    ("common", "(?:[cdkm]?m|in|ft)\\}?\\^[23]", "(?:[cdkm]?m|in|ft)\\}?\\^2"),
    ("common", "dtype = torch.bfloat16 if frozen and args.bf16 else torch.float32",
     "dtype = torch.bfloat16 if args.bf16 else torch.float32"),
    ("common", "ids = ids[:1] + ids[-limit:][1:]\n        return ids[:-1] if no_end",
     "ids = ids[-limit:]\n        return ids[:-1] if no_end"),
    ("common", "and getattr(args, flag.name) != default_of(flag)}", "and getattr(args, flag.name) != flag.default}"),
    ("common", '"gradient_checkpointing", "merge",', '"gradient_checkpointing", "weight_decay", "merge",'),
    ("common", '"evaluation data": fingerprint(held)', '"evaluation data": fingerprint(held[:1])'),
    ("common", '        self.state["unevaluated"] |= total_steps == 0  # then', "        pass  # then"),
    ("common", "held[0] < held[1]", "held[0] <= held[1]"),
    ("common", 'x.max().clamp(min=before) if name.endswith("/max")', 'x.max() if name.endswith("/max")'),
    ("common", "if self.track and (evaluation or self.step % self.args.logging_steps == 0):",
     "if self.track and self.step % self.args.logging_steps == 0:"),
    ("common", "made = self.step - self.first\n", "made = self.step\n"),
    ("common", 'f"  {self.tokens / seconds:,.0f} tok/s"', 'f"  {self.state[\'num_tokens\'] / seconds:,.0f} tok/s"'),
    ("common", "self.step % self.args.logging_steps == 0 or self.step == self.total_steps or silent()",
     "self.step % self.args.logging_steps == 0 or silent()"),
    ("common", "return bool(value) or off is None and value == 0 and value is not False",
     "return bool(value) or off is None and value == 0"),
]


def mutate(folder, where, old, new):
    """Writes the mutant into a copy of the project -> the files that it changed. ValueError where its words
    are not there, or, of a single file, not exactly once."""
    changed = []
    for name in SCRIPTS if where == "*" else [where]:
        path = os.path.join(folder, f"{name}.py")
        with open(path) as file:
            text = file.read()
        if where != "*" and text.count(old) != 1:
            raise ValueError(f"{name}.py has {text.count(old)} times: {old}")
        changed += [name] * (old in text)
        with open(path, "w") as file:
            file.write(text.replace(old, new))
    if not changed:
        raise ValueError(f"no script has: {old}")
    return changed


def killer(folder, changed):
    """The first test that fails in this copy of the project, or None."""
    own = ["test_numbers.py", *(f"test_{name}.py" for name in changed), "test_wiring.py", "test_audit.py"]
    several = ["test_processes.py"]
    others = sorted(n for n in os.listdir(os.path.join(folder, "tests")) if re.match(r"test_\w+\.py", n)
                    and n not in {*TEXTUAL, *own, *several})
    for marks, names in (("not long", own), ("not long", others), ("long or not long", several),
                         ("long", ["test_resume.py"])):
        words = [sys.executable, "-m", "pytest", "-x", "-q", "-m", marks, "-p", "no:cacheprovider", "-o",
                 "addopts=", *(f"tests/{name}" for name in names)]
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})
        failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
        if done.returncode == 4:
            raise RuntimeError(f"the tests did not begin: {done.stdout}{done.stderr}")
        if failed or done.returncode not in (0, 5):  # 5: no test has these marks
            return failed[1] if failed else f"exit {done.returncode}"
    return None


def examine(mutant):
    """-> (what killed it, or None; seconds). It lives in a copy of its own."""
    started = time.time()
    with tempfile.TemporaryDirectory() as parent:
        folder = os.path.join(parent, "project")
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".git", "out", "__pycache__"))
        changed = mutate(folder, *mutant)
        return killer(folder, changed), time.time() - started


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", default="", help="mutants whose file or words contain this")
    args = parser.parse_args()
    chosen = [m for m in MUTANTS if args.only in " ".join(m)]
    survivors = []
    with ThreadPoolExecutor(args.jobs) as pool:
        for mutant, (test, seconds) in zip(chosen, pool.map(examine, chosen)):
            where, old, new = (" ".join(words.split()) for words in mutant)
            print(f"{test or 'SURVIVES':<75} {seconds:4.0f} s  {where}: {old[:60]} -> {new[:60]}", flush=True)
            survivors += [] if test else [mutant]
    print(f"{len(survivors)} of {len(chosen)} mutants survive")
    sys.exit(bool(survivors))


if __name__ == "__main__":
    main()
