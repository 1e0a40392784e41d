//! `rdpo chat`: streams answers in the terminal.

use std::io::{BufRead, IsTerminal, Write};

use clap::Args;
use futures_util::StreamExt;
use serde_json::{Value, json};

use super::{Client, Remote};
use crate::error::{Error, Result};

/// Arguments of `rdpo chat`.
#[derive(Args)]
pub(super) struct ChatArgs {
    #[command(flatten)]
    remote: Remote,
    /// Who answers: student, student:base, student@3, teacher, or an adapter's name (`rdpo score` asks the reward model)
    #[arg(long, short, default_value = "student")]
    model: String,
    /// System message
    #[arg(long)]
    system: Option<String>,
    /// Sampling temperature; the model's own default when absent
    #[arg(long)]
    temperature: Option<f64>,
    /// Most tokens of an answer
    #[arg(long, default_value_t = 512)]
    max_tokens: usize,
    /// Seed, for the same answer every time
    #[arg(long)]
    seed: Option<u64>,
    /// The message; without one, a conversation is read from the terminal
    message: Vec<String>,
}

/// Runs the command.
pub(super) async fn chat(args: &ChatArgs) -> Result<()> {
    let client = Client::new(&args.remote)?;
    let mut messages: Vec<Value> = args.system.iter().map(|text| json!({"role": "system", "content": text})).collect();
    if !args.message.is_empty() {
        messages.push(json!({"role": "user", "content": args.message.join(" ")}));
        return answer(&client, args, &messages).await.map(drop);
    }
    let terminal = std::io::stdin().is_terminal();
    if terminal {
        println!("Talking to {} at {}. An empty line or Ctrl-D ends.", args.model, client.base());
    }
    loop {
        if terminal {
            print!("> ");
            flush()?;
        }
        let mut line = String::new();
        if std::io::stdin().lock().read_line(&mut line)? == 0 || line.trim().is_empty() {
            return Ok(());
        }
        messages.push(json!({"role": "user", "content": line.trim()}));
        let said = answer(&client, args, &messages).await?;
        messages.push(json!({"role": "assistant", "content": said}));
    }
}

async fn answer(client: &Client, args: &ChatArgs, messages: &[Value]) -> Result<String> {
    let mut body = json!({"model": args.model, "messages": messages, "stream": true, "max_tokens": args.max_tokens});
    if let Some(temperature) = args.temperature {
        body["temperature"] = json!(temperature);
    }
    if let Some(seed) = args.seed {
        body["seed"] = json!(seed);
    }
    let mut chunks = client.stream("/v1/chat/completions", &body).await?;
    let mut said = String::new();
    let mut finish = None;
    while let Some(chunk) = chunks.next().await {
        let chunk = chunk?;
        let choice = &chunk["choices"][0];
        if let Some(text) = choice["delta"]["content"].as_str() {
            print!("{text}");
            flush()?;
            said.push_str(text);
        }
        finish = choice["finish_reason"].as_str().map(str::to_owned).or(finish);
    }
    println!();
    match finish.as_deref() {
        None => Err(Error::internal("the answer broke off: the stream ended without a finish reason")),
        Some("length") => {
            eprintln!("[cut at {} tokens; --max-tokens allows more]", args.max_tokens);
            Ok(said)
        }
        Some(_) => Ok(said),
    }
}

fn flush() -> Result<()> {
    Ok(std::io::stdout().flush()?)
}
