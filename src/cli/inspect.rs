//! `rdpo models`, `jobs`, `score`, `synthesize`: one request each, the answer as lines or as JSON.

use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::{Client, Remote, follow, table, train};
use crate::error::{Error, Result};

/// Arguments of `rdpo jobs`.
#[derive(Args)]
pub(super) struct JobsArgs {
    #[command(flatten)]
    remote: Remote,
    #[command(subcommand)]
    action: Option<JobAction>,
}

#[derive(Subcommand)]
enum JobAction {
    /// List jobs, newest first (the default)
    List,
    /// Print a job as JSON
    Show {
        /// Its id
        id: String,
    },
    /// Print what a job said
    Events {
        /// Its id
        id: String,
    },
    /// Show a job live until it ends, then its report
    Follow {
        /// Its id
        id: String,
    },
    /// Print a job's before/after table
    Report {
        /// Its id
        id: String,
    },
    /// End a job
    Cancel {
        /// Its id
        id: String,
    },
    /// Halt a job; its rows are kept
    Pause {
        /// Its id
        id: String,
    },
    /// Go on with a paused or failed job
    Resume {
        /// Its id
        id: String,
    },
}

/// Arguments of `rdpo score`.
#[derive(Args)]
pub(super) struct ScoreArgs {
    #[command(flatten)]
    remote: Remote,
    /// What was asked
    #[arg(long)]
    prompt: String,
    /// The reward role
    #[arg(long, default_value = "reward")]
    model: String,
    /// Responses to score
    #[arg(required = true)]
    responses: Vec<String>,
}

/// Arguments of `rdpo synthesize`.
#[derive(Args)]
pub(super) struct SynthesizeArgs {
    #[command(flatten)]
    remote: Remote,
    /// Name of a behaviour the server knows
    #[arg(long, default_value = "safety")]
    behavior: String,
    /// More prompts: one a line, or JSON lines
    #[arg(long, value_name = "FILE")]
    prompts_file: Option<PathBuf>,
    /// Most tokens of each turn
    #[arg(long)]
    max_tokens: Option<usize>,
    /// Seed
    #[arg(long)]
    seed: Option<u64>,
    /// Print JSON lines
    #[arg(long)]
    json: bool,
    /// Prompts
    prompts: Vec<String>,
}

/// `rdpo models`.
pub(super) async fn models(remote: &Remote) -> Result<()> {
    let list = Client::new(remote)?.get("/v1/models").await?;
    println!("{:<28} {:>8}  {:<14} root", "model", "version", "generation");
    for model in list["data"].as_array().into_iter().flatten() {
        let version = model["adapter_version"].as_u64().map_or(String::new(), |version| version.to_string());
        let generation = model["adapter_generation"].as_str().unwrap_or_default();
        let root = model["root"].as_str().unwrap_or_default();
        println!("{:<28} {version:>8}  {:<14} {root}", text(model, "id"), table::clip(generation, 12));
    }
    Ok(())
}

/// `rdpo jobs`.
pub(super) async fn jobs(args: &JobsArgs) -> Result<()> {
    let client = Client::new(&args.remote)?;
    let path = |id: &str, what: &str| format!("/v1/rdpo/train/{id}{what}");
    match args.action.as_ref().unwrap_or(&JobAction::List) {
        JobAction::List => {
            let list = client.get("/v1/rdpo/train?limit=50").await?;
            for job in list["data"].as_array().into_iter().flatten() {
                let alias = job["request"]["publish"]["alias"].as_str().unwrap_or_default();
                let (id, status, age) = (text(job, "id"), text(job, "status"), ago(&job["created_at"]));
                println!("{id}  {status:<13} {age:>11}  {alias:<12} {}", summary(job));
            }
            Ok(())
        }
        JobAction::Show { id } => print_json(&client.get(&path(id, "")).await?),
        JobAction::Events { id } => {
            let mut after = 0;
            loop {
                let page = client.get(&path(id, &format!("/events?limit=1000&after={after}"))).await?;
                for event in page["data"].as_array().into_iter().flatten() {
                    println!(
                        "{:>11}  {:<5} {}",
                        ago(&event["created_at"]),
                        text(event, "level"),
                        text(event, "message")
                    );
                    after = event["id"].as_i64().unwrap_or(after);
                }
                if page["has_more"] != true {
                    return Ok(());
                }
            }
        }
        JobAction::Follow { id } => {
            let followed = follow::follow(&client, id, |_| {}).await?;
            follow::outcome(&followed.job)?;
            train::finish(&client, id, &followed).await
        }
        JobAction::Report { id } => {
            print!("{}", table::report(&client.get(&path(id, "/report")).await?));
            Ok(())
        }
        JobAction::Cancel { id } => change(&client, id, "cancel").await,
        JobAction::Pause { id } => change(&client, id, "pause").await,
        JobAction::Resume { id } => change(&client, id, "resume").await,
    }
}

async fn change(client: &Client, id: &str, verb: &str) -> Result<()> {
    let job = client.post(&format!("/v1/rdpo/train/{id}/{verb}"), &json!({})).await?;
    println!("{id} {}", text(&job, "status"));
    Ok(())
}

/// How long ago a time in Unix seconds was.
fn ago(at: &Value) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    match now.saturating_sub(at.as_u64().unwrap_or(now)) {
        seconds @ ..120 => format!("{seconds} s ago"),
        seconds @ ..7200 => format!("{} min ago", seconds / 60),
        seconds @ ..172_800 => format!("{} h ago", seconds / 3600),
        seconds => format!("{} days ago", seconds / 86_400),
    }
}

fn summary(job: &Value) -> String {
    if let Some(version) = job["adapter_version"].as_u64() {
        return format!("version {version}");
    }
    if let Some(message) = job["error"]["message"].as_str() {
        return table::clip(message, 60);
    }
    let stage = &job["progress"][text(job, "status")];
    match (stage["done"].as_u64(), stage["total"].as_u64()) {
        (Some(done), Some(total)) => format!("{done}/{total}"),
        _ => String::new(),
    }
}

/// `rdpo score`.
pub(super) async fn score(args: &ScoreArgs) -> Result<()> {
    let body = json!({"model": args.model, "prompt": args.prompt, "responses": args.responses});
    let scores = Client::new(&args.remote)?.post("/v1/score", &body).await?;
    let scores = scores["data"].as_array().cloned().unwrap_or_default();
    if scores.len() != args.responses.len() {
        let (got, want) = (scores.len(), args.responses.len());
        return Err(Error::internal(format!("the server gave {got} scores for {want} responses")));
    }
    for (score, response) in scores.iter().zip(&args.responses) {
        println!("{:>9.4}  {}", score["score"].as_f64().unwrap_or(f64::NAN), table::clip(response, 85));
    }
    Ok(())
}

/// `rdpo synthesize`.
pub(super) async fn synthesize(args: &SynthesizeArgs) -> Result<()> {
    let mut prompts: Vec<Value> = args.prompts.iter().map(|text| json!(text)).collect();
    if let Some(path) = &args.prompts_file {
        prompts.extend(train::prompts_of(path)?);
    }
    if prompts.is_empty() {
        return Err(Error::invalid("prompts", "give prompts as arguments or with --prompts-file"));
    }
    let mut body = json!({"behavior": args.behavior, "prompts": prompts});
    if let Some(most) = args.max_tokens {
        body["synthesis"] = json!({"max_tokens": most});
    }
    if let Some(seed) = args.seed {
        body["seed"] = json!(seed);
    }
    let samples = Client::new(&args.remote)?.post("/v1/rdpo/synthesize", &body).await?;
    for sample in samples["data"].as_array().into_iter().flatten() {
        if args.json {
            println!("{sample}");
            continue;
        }
        for field in ["prompt", "response", "critique", "revised"] {
            println!("── {field} ──\n{}\n", text(sample, field).trim());
        }
    }
    Ok(())
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_default()
}

fn print_json(value: &Value) -> Result<()> {
    println!("{}", serde_json::to_string_pretty(value)?);
    Ok(())
}
