//! The before/after table of a job's report, and text wrapped into columns.

use std::fmt::Write;

use serde_json::Value;

const WIDTH: usize = 100;
const MOST_LINES: usize = 9;

/// The report as text of at most 100 columns: means, win rate, and sample answers side by side.
pub(super) fn report(report: &Value) -> String {
    let number = |paths: &[&str]| paths.iter().find_map(|path| report.pointer(path)).and_then(Value::as_f64);
    let mut out = String::new();
    let mut row = |name: &str, before: Option<f64>, after: Option<f64>, digits: usize| {
        if before.is_some() || after.is_some() {
            let show = |value: Option<f64>| value.map_or("–".to_owned(), |value| format!("{value:.digits$}"));
            let change =
                before.zip(after).map_or(String::new(), |(before, after)| format!("{:+.digits$}", after - before));
            let _ = writeln!(out, "  {name:<28} {:>12} {:>12} {change:>12}", show(before), show(after));
        }
    };
    let held_out = number(&["/prompts"]) != Some(0.0);
    let number = |paths: &[&str]| number(paths).filter(|_| held_out);
    row("mean reward", number(&["/mean_reward_base"]), number(&["/mean_reward_aligned"]), 3);
    row("mean length, tokens", number(&["/mean_tokens_base"]), number(&["/mean_tokens_aligned"]), 1);
    let mut text = format!("  {:<28} {:>12} {:>12} {:>12}\n", "held-out prompts", "before", "after", "change");
    let _ = writeln!(text, "  {}", "─".repeat(67));
    text.push_str(if held_out {
        &out
    } else {
        "  none: nothing was compared (training.eval_fraction, eval_prompts)\n"
    });
    if let Some(rate) = number(&["/win_rate"]) {
        let interval = match (number(&["/win_rate_interval/0"]), number(&["/win_rate_interval/1"])) {
            (Some(low), Some(high)) => format!("  (95% interval {:.0}%–{:.0}%)", low * 100.0, high * 100.0),
            _ => String::new(),
        };
        let _ = writeln!(text, "  {:<28} {:>25.0}%{interval}", "win rate against the base", rate * 100.0);
    }
    if let Some(kl) = number(&["/kl_per_token"]) {
        let _ = writeln!(text, "  {:<28} {kl:>26.4}", "KL to the base, nats a token");
    }
    for sample in report["samples"].as_array().into_iter().flatten().take(3) {
        let _ = writeln!(text, "\n  {}", clip(sample["prompt"].as_str().unwrap_or_default(), WIDTH - 2));
        let score = |key: &str| sample[key].as_f64().map_or(String::new(), |score| format!(" (reward {score:.2})"));
        let head = [format!("before{}", score("score_base")), format!("after{}", score("score_aligned"))];
        let body = |key: &str| sample[key].as_str().unwrap_or_default().to_owned();
        text.push_str(&columns(&head, &[body("base"), body("aligned")]));
    }
    text
}

fn columns(head: &[String; 2], body: &[String; 2]) -> String {
    let width = (WIDTH - 5) / 2;
    let left = wrap(&body[0], width);
    let right = wrap(&body[1], width);
    let mut text = String::new();
    let mut line = |left: &str, right: &str| {
        let gap = width.saturating_sub(left.chars().count());
        let _ = writeln!(text, "  {left}{} │ {right}", " ".repeat(gap));
    };
    line(&head[0], &head[1]);
    for index in 0..left.len().max(right.len()) {
        line(left.get(index).map_or("", String::as_str), right.get(index).map_or("", String::as_str));
    }
    text
}

/// Breaks at spaces; a word longer than the width is cut; at most a few lines, then an ellipsis.
fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let mut word: Vec<char> = word.chars().collect();
        loop {
            let used = lines.last().map_or(0, |line| line.chars().count());
            let space = usize::from(used > 0);
            if used + space + word.len() <= width {
                if let Some(line) = lines.last_mut() {
                    line.push_str(&" ".repeat(space));
                    line.extend(&word);
                }
                break;
            }
            if used == 0 {
                let rest = word.split_off(width);
                if let Some(line) = lines.last_mut() {
                    line.extend(&word);
                }
                word = rest;
            }
            lines.push(String::new());
        }
    }
    if lines.len() > MOST_LINES {
        lines.truncate(MOST_LINES);
        if let Some(line) = lines.last_mut() {
            *line = line.chars().take(width - 1).chain(['…']).collect();
        }
    }
    lines
}

/// The first line, cut to `width` characters.
pub(super) fn clip(text: &str, width: usize) -> String {
    let line = text.lines().next().unwrap_or_default();
    if line.chars().count() <= width {
        return line.to_owned();
    }
    let mut cut: String = line.chars().take(width.saturating_sub(1)).collect();
    cut.push('…');
    cut
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn lines_fit_their_columns() {
        let text = "Grüße an alle ".repeat(60) + &"x".repeat(200);
        let cut = wrap(&text, 40);
        assert!(cut.iter().all(|line| line.chars().count() <= 40), "{cut:?}");
        assert!(cut.last().is_some_and(|last| last.ends_with('…') && !last.ends_with("……")), "{cut:?}");
        assert_eq!(wrap("a bb ccc", 4), ["a bb", "ccc"]);
        assert_eq!(wrap("abcdefgh", 3), ["abc", "def", "gh"]);
    }

    #[test]
    fn a_report_fits_a_hundred_columns_and_shows_the_change() {
        let text = report(&json!({
            "mean_reward_base": 3.0, "mean_tokens_base": 20.0, "mean_reward_aligned": 3.5, "mean_tokens_aligned": 25.5,
            "win_rate": 0.625, "win_rate_interval": [0.3, 0.85], "kl_per_token": 0.012,
            "samples": [{"prompt": "word ".repeat(50), "base": "no ".repeat(200), "aligned": "yes", "score_base": 1.0}],
        }));
        assert!(text.lines().all(|line| line.chars().count() <= WIDTH + 1), "{text}");
        assert!(text.contains("+0.500") && text.contains("62%") && text.contains("30%–85%"), "{text}");
    }
}
