//! Shows a job live: one bar for each stage, the last training metrics, and how long each stage took.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressState, ProgressStyle};
use serde_json::Value;

use super::Client;
use super::table;
use crate::error::{Error, Result};

const STAGES: [&str; 5] = ["synthesizing", "scoring", "training", "evaluating", "publishing"];
const ENDED: [&str; 4] = ["succeeded", "failed", "cancelled", "paused"];

/// What following a job left behind.
pub(super) struct Followed {
    /// The job as it ended.
    pub(super) job: Value,
    /// Wall time by stage, in order.
    pub(super) stages: Vec<(String, Duration)>,
}

struct Display {
    all: MultiProgress,
    bars: BTreeMap<usize, ProgressBar>,
    current: Option<(String, Instant)>,
    stages: Vec<(String, Duration)>,
}

impl Display {
    fn bar(&mut self, stage: &str) -> Option<&ProgressBar> {
        let index = STAGES.iter().position(|&name| name == stage)?;
        let all = &self.all;
        Some(self.bars.entry(index).or_insert_with(|| {
            let bar = all.add(ProgressBar::new(1).with_prefix(stage.to_owned()));
            let template = "{prefix:>13} [{bar:30}] {pos:>4}/{len:<4} {elapsed:>4} {rate:>7} eta {eta:<4} {msg}";
            if let Ok(style) = ProgressStyle::with_template(template) {
                let rate = |state: &ProgressState, out: &mut dyn std::fmt::Write| {
                    // A bar whose writer fails has nobody to tell.
                    let _ = write!(out, "{:.1}/s", state.per_sec());
                };
                bar.set_style(style.with_key("rate", rate).progress_chars("━╸ "));
            }
            bar.enable_steady_tick(Duration::from_millis(250));
            bar
        }))
    }

    fn enter(&mut self, status: &str) {
        if self.current.as_ref().is_some_and(|(name, _)| name == status) {
            return;
        }
        if let Some((name, since)) = self.current.take() {
            if let Some(bar) = self.bar(&name) {
                bar.abandon();
            }
            self.stages.push((name, since.elapsed()));
        }
        if !ENDED.contains(&status) {
            self.current = Some((status.to_owned(), Instant::now()));
        }
    }

    fn take(&mut self, event: &Value) {
        let data = &event["data"];
        match event["type"].as_str() {
            Some("status") => {
                if let Some(status) = data["status"].as_str() {
                    self.enter(status);
                }
            }
            Some("progress") => {
                let (done, total) = (data["done"].as_u64().unwrap_or(0), data["total"].as_u64().unwrap_or(0));
                if let Some(bar) = data["stage"].as_str().and_then(|stage| self.bar(stage)) {
                    bar.set_length(total.max(1));
                    bar.set_position(done);
                }
            }
            Some("metrics") => {
                let line = metrics_line(data);
                if let Some(bar) = self.bar("training") {
                    bar.set_message(line);
                }
            }
            _ => {}
        }
        let worth_saying = event["level"] != "info" || event["type"] == "message";
        if worth_saying && let Some(message) = event["message"].as_str() {
            let line = format!("  {}: {}", event["level"].as_str().unwrap_or("info"), table::clip(message, 90));
            if self.all.println(&line).is_err() || self.all.is_hidden() {
                eprintln!("{line}");
            }
        }
    }
}

fn metrics_line(data: &Value) -> String {
    let named = [("loss", "loss"), ("rewards/accuracies", "acc"), ("rewards/margins", "margin")];
    let parts = named.iter().filter_map(|(key, short)| data[key].as_f64().map(|value| format!("{short} {value:.3}")));
    parts.collect::<Vec<_>>().join("  ")
}

/// Follows job `id` until it ends or halts. `on_status` hears each change of state.
pub(super) async fn follow(client: &Client, id: &str, mut on_status: impl FnMut(&str)) -> Result<Followed> {
    let mut display = Display { all: MultiProgress::new(), bars: BTreeMap::new(), current: None, stages: Vec::new() };
    let mut after = 0;
    let mut quiet = 0;
    loop {
        // Asked first: what the job says after it ended is then still read below.
        let job = client.get(&format!("/v1/rdpo/train/{id}")).await?;
        loop {
            let page = client.get(&format!("/v1/rdpo/train/{id}/events?after={after}&limit=100")).await?;
            let events = page["data"].as_array().cloned().unwrap_or_default();
            let mut newest = after;
            for event in &events {
                newest = newest.max(event_number(event));
                if let (Some("status"), Some(status)) = (event["type"].as_str(), event["data"]["status"].as_str()) {
                    on_status(status);
                }
                display.take(event);
            }
            let moved = newest > after;
            after = newest;
            if !moved || events.len() < 100 {
                quiet = if moved { 0 } else { quiet + 1 };
                break;
            }
        }
        let status = job["status"].as_str().unwrap_or_default().to_owned();
        if ENDED.contains(&status.as_str()) {
            display.enter(&status);
            return Ok(Followed { job, stages: display.stages });
        }
        tokio::time::sleep(Duration::from_millis(if quiet > 20 { 1000 } else { 300 })).await;
    }
}

fn event_number(event: &Value) -> i64 {
    let text = event["id"].as_str().map(|id| id.trim_start_matches(|letter: char| !letter.is_ascii_digit()));
    event["id"].as_i64().or_else(|| text.and_then(|text| text.parse().ok())).unwrap_or(0)
}

/// The end of a followed job as a result: an error unless it succeeded.
pub(super) fn outcome(job: &Value) -> Result<()> {
    let id = job["id"].as_str().unwrap_or_default();
    match job["status"].as_str() {
        Some("succeeded") => Ok(()),
        Some("paused") => {
            let why = job["error"]["message"].as_str().map(|why| format!(" ({why})")).unwrap_or_default();
            Err(Error::conflict(format!("the job is paused{why}; `rdpo jobs resume {id}` goes on with it")))
        }
        Some("failed") => {
            let why = job["error"]["message"].as_str().unwrap_or("no reason given");
            Err(Error::internal(format!("the job failed: {why}\nIts rows are kept: `rdpo jobs resume {id}` goes on.")))
        }
        status => Err(Error::conflict(format!("the job is {}", status.unwrap_or("in an unknown state")))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_metrics_line_takes_what_is_there() {
        assert_eq!(metrics_line(&json!({"loss": 0.51234, "rewards/margins": 0.5})), "loss 0.512  margin 0.500");
        assert_eq!(metrics_line(&json!({})), "");
    }

    #[test]
    fn event_ids_may_be_numbers_or_prefixed() {
        assert_eq!(event_number(&json!({"id": 12})), 12);
        assert_eq!(event_number(&json!({"id": "ftevent-34"})), 34);
    }
}
