//! `rdpo train`: builds a job request from a file and flags, submits it, follows it, ends with the before/after table.

use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::{Value, json};

use super::follow::{self, Followed};
use super::{Client, Remote, table};
use crate::error::{Error, Result};

/// Arguments of `rdpo train`.
#[derive(Args)]
pub(super) struct TrainArgs {
    #[command(flatten)]
    remote: Remote,
    /// Job request as JSON (`-` for standard input); flags override its fields
    #[arg(long, short, value_name = "FILE")]
    request: Option<PathBuf>,
    /// Name of a behaviour the server knows
    #[arg(long)]
    behavior: Option<String>,
    /// Prompts: one a line, or JSON lines of text or {"prompt"} or {"messages"}
    #[arg(long, value_name = "FILE")]
    prompts: Option<PathBuf>,
    /// Held-out prompts for the report, in the same forms
    #[arg(long, value_name = "FILE")]
    eval_prompts: Option<PathBuf>,
    /// Ready pairs as JSON lines {"prompt", "chosen", "rejected"}: skips synthesis
    #[arg(long, value_name = "FILE")]
    pairs: Option<PathBuf>,
    /// Loss: rdpo, rdpo_soft, dpo, cdpo, robust, ipo, hinge, sft
    #[arg(long)]
    loss: Option<String>,
    /// Strength of the tie to the reference
    #[arg(long)]
    beta: Option<f64>,
    /// Passes over the pairs
    #[arg(long)]
    epochs: Option<f64>,
    /// Peak learning rate
    #[arg(long)]
    learning_rate: Option<f64>,
    /// Pairs in a step
    #[arg(long)]
    batch_size: Option<usize>,
    /// Rank of the adapter
    #[arg(long)]
    rank: Option<usize>,
    /// Most tokens of each generated turn
    #[arg(long)]
    max_tokens: Option<usize>,
    /// Name the adapter goes live under
    #[arg(long)]
    alias: Option<String>,
    /// Seed of everything
    #[arg(long)]
    seed: Option<u64>,
    /// Print the job's id and return at once
    #[arg(long)]
    detach: bool,
}

/// Runs the command.
pub(super) async fn train(args: &TrainArgs) -> Result<()> {
    let client = Client::new(&args.remote)?;
    let request = request_of(args)?;
    let job = client.post("/v1/rdpo/train", &request).await?;
    let id = job_id(&job)?;
    if args.detach {
        println!("{id}");
        return Ok(());
    }
    println!("job {id}: `rdpo jobs pause {id}` halts it, leaving this display does not");
    let followed = follow::follow(&client, &id, |_| {}).await?;
    follow::outcome(&followed.job)?;
    finish(&client, &id, &followed).await
}

/// Prints times and the before/after table of an ended job.
pub(super) async fn finish(client: &Client, id: &str, followed: &Followed) -> Result<()> {
    println!();
    for (stage, time) in &followed.stages {
        println!("  {stage:<14} {:>7.1} s", time.as_secs_f64());
    }
    println!();
    let report = client.get(&format!("/v1/rdpo/train/{id}/report")).await?;
    print!("{}", table::report(&report));
    Ok(())
}

/// The id of a job object.
pub(super) fn job_id(job: &Value) -> Result<String> {
    job["id"].as_str().map(str::to_owned).ok_or_else(|| Error::internal("the server's answer has no job id"))
}

fn request_of(args: &TrainArgs) -> Result<Value> {
    let mut request = match &args.request {
        Some(path) => serde_json::from_str(&read(path)?)
            .map_err(|error| Error::invalid("--request", format!("{} is not JSON: {error}", path.display())))?,
        None => json!({}),
    };
    if !request.is_object() {
        return Err(Error::invalid("--request", "the file must hold one JSON object"));
    }
    let mut set = |pointer: [&str; 2], value: Option<Value>| {
        if let Some(value) = value {
            match pointer {
                [field, ""] => request[field] = value,
                [group, field] => {
                    if !request[group].is_object() {
                        request[group] = json!({});
                    }
                    request[group][field] = value;
                }
            }
        }
    };
    let lines = |path: &Option<PathBuf>| path.as_deref().map(prompts_of).transpose();
    set(["behavior", ""], args.behavior.as_ref().map(|name| json!(name)));
    set(["prompts", ""], lines(&args.prompts)?.map(Value::Array));
    set(["eval_prompts", ""], lines(&args.eval_prompts)?.map(Value::Array));
    set(["pairs", ""], args.pairs.as_deref().map(|path| json_lines(path, &read(path)?)).transpose()?.map(Value::Array));
    set(["loss", "type"], args.loss.as_ref().map(|name| json!(name)));
    set(["loss", "beta"], args.beta.map(|value| json!(value)));
    set(["training", "epochs"], args.epochs.map(|value| json!(value)));
    set(["training", "learning_rate"], args.learning_rate.map(|value| json!(value)));
    set(["training", "batch_size"], args.batch_size.map(|value| json!(value)));
    set(["lora", "r"], args.rank.map(|value| json!(value)));
    set(["synthesis", "max_tokens"], args.max_tokens.map(|value| json!(value)));
    set(["publish", "alias"], args.alias.as_ref().map(|name| json!(name)));
    set(["seed", ""], args.seed.map(|value| json!(value)));
    Ok(request)
}

fn read(path: &Path) -> Result<String> {
    if path == Path::new("-") {
        return Ok(std::io::read_to_string(std::io::stdin())?);
    }
    std::fs::read_to_string(path).map_err(|error| Error::not_found(format!("cannot read {}: {error}", path.display())))
}

fn json_lines(path: &Path, text: &str) -> Result<Vec<Value>> {
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let parsed = lines.map(|(number, line)| {
        serde_json::from_str(line)
            .map_err(|error| Error::invalid(format!("{}:{}", path.display(), number + 1), format!("not JSON: {error}")))
    });
    parsed.collect()
}

/// Prompts of a file: JSON lines where it is named `.jsonl` or its first line is a JSON string or object, plain lines otherwise.
pub(super) fn prompts_of(path: &Path) -> Result<Vec<Value>> {
    let text = read(path)?;
    let first = text.lines().map(str::trim).find(|line| !line.is_empty()).unwrap_or_default();
    let is_json = matches!(serde_json::from_str(first), Ok(Value::String(_) | Value::Object(_)));
    if !is_json && path.extension().is_none_or(|extension| extension != "jsonl") {
        return Ok(text.lines().map(str::trim).filter(|line| !line.is_empty()).map(|line| json!(line)).collect());
    }
    let unwrap_prompt = |mut value: Value| match value.get_mut("prompt") {
        Some(prompt) => prompt.take(),
        None => value,
    };
    Ok(json_lines(path, &text)?.into_iter().map(unwrap_prompt).collect())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn prompt_files_come_in_three_forms() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("prompts");
        std::fs::write(&path, "one\n\n two \n").unwrap();
        assert_eq!(prompts_of(&path).unwrap(), [json!("one"), json!("two")]);
        std::fs::write(&path, "{\"prompt\": \"a\"}\n\"b\"\n{\"messages\": []}\n").unwrap();
        assert_eq!(prompts_of(&path).unwrap(), [json!("a"), json!("b"), json!({"messages": []})]);
        std::fs::write(&path, "\"Bats are blind\", he says. Is he right?\n").unwrap();
        assert_eq!(prompts_of(&path).unwrap(), [json!("\"Bats are blind\", he says. Is he right?")]);
        let named = folder.path().join("prompts.jsonl");
        std::fs::write(&named, "{oops\n").unwrap();
        assert!(prompts_of(&named).unwrap_err().param.unwrap().ends_with(":1"));
        std::fs::write(&path, "\"b\"\n{oops\n").unwrap();
        assert!(prompts_of(&path).unwrap_err().param.unwrap().ends_with(":2"));
    }
}
