//! `rdpo demo`: the whole method on this machine. Starts a server, has it align its student while it goes on answering, and shows
//! before and after.

use std::io::{BufRead, BufReader, IsTerminal};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use clap::Args;
use serde_json::{Value, json};

use super::follow::{self, Followed};
use super::{Client, Remote, train};
use crate::config::{Overrides, Settings};
use crate::error::{Error, Result};

/// The prompts: those to learn from, an empty line, those held out for the report.
const PROMPTS: &str = include_str!("demo_prompts.txt");
/// What is asked while the job runs, to see that the server goes on answering.
const PROBE: &str = "What is the capital of France?";
/// Between two of these questions.
const PROBE_PAUSE: Duration = Duration::from_secs(2);

/// Arguments of `rdpo demo`.
#[derive(Args, Clone, Debug)]
pub(super) struct DemoArgs {
    /// Settings file (default: rdpo.toml where it exists)
    #[arg(long, short, env = "RDPO_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// Behaviour to learn
    #[arg(long, default_value = "sycophancy")]
    behavior: String,
    /// Most tokens of each generated turn
    #[arg(long, default_value_t = 96)]
    max_tokens: usize,
    /// Passes over the pairs
    #[arg(long, default_value_t = 2.0)]
    epochs: f64,
    /// Seed of everything
    #[arg(long, default_value_t = 42)]
    seed: u64,
    /// End when the report is shown, also in a terminal (without one it always does)
    #[arg(long)]
    exit: bool,
}

/// Runs the command.
pub(super) async fn demo(args: &DemoArgs) -> Result<()> {
    let (server, client) = start(args).await?;
    let outcome = align(args, &client).await;
    let keep = outcome.is_ok() && !args.exit && std::io::stdin().is_terminal();
    if keep {
        println!("\nThe server goes on at {}; Ctrl-C stops it.", client.base());
        let _ = tokio::signal::ctrl_c().await;
    }
    drop(server);
    outcome
}

/// The server of the demo: this program once more. Stopped when dropped.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        // Ctrl-C reaches it too; a job in progress is resumed by the next server either way.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

async fn start(args: &DemoArgs) -> Result<(Server, Client)> {
    let settings = Settings::load(&Overrides { config: args.config.clone(), ..Overrides::default() })?;
    let port = match std::net::TcpListener::bind((settings.server.host.as_str(), settings.server.port)) {
        Ok(_) => settings.server.port,
        Err(error) => {
            println!("port {} cannot be had ({error}); taking a free one", settings.server.port);
            0
        }
    };
    let folder = settings.store.path.parent().map_or_else(PathBuf::new, PathBuf::from);
    std::fs::create_dir_all(&folder)?;
    let log = folder.join("demo.log");
    println!("starting the server (its log: {}) …", log.display());
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["serve", "--port", &port.to_string()]);
    if let Some(config) = &args.config {
        command.arg("--config").arg(config);
    }
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(std::fs::File::create(&log)?).spawn()?;
    let stdout = child.stdout.take().ok_or_else(|| Error::internal("the server has no output. This is a bug."))?;
    let server = Server(child);
    let line = tokio::task::spawn_blocking(move || BufReader::new(stdout).lines().next());
    let line = line.await.map_err(|error| Error::internal(error.to_string()))?;
    let url = match &line {
        Some(Ok(line)) => line.split_whitespace().find(|word| word.starts_with("http://")),
        _ => None,
    };
    let Some(url) = url else {
        let said = std::fs::read_to_string(&log).unwrap_or_default();
        let last: Vec<&str> = said.lines().rev().take(3).collect();
        let last: Vec<&str> = last.into_iter().rev().collect();
        return Err(Error::internal(format!("the server did not start:\n{}", last.join("\n"))));
    };
    println!("{}", line.as_ref().and_then(|line| line.as_ref().ok()).map_or("", String::as_str));
    let remote = Remote { url: url.to_owned(), api_key: settings.server.api_keys.first().cloned() };
    Ok((server, Client::new(&remote)?))
}

/// The job with a client that goes on asking, then what came of it.
async fn align(args: &DemoArgs, client: &Client) -> Result<()> {
    let (learnt, held_out) = prompts();
    let request = json!({
        "behavior": args.behavior,
        "prompts": learnt,
        "eval_prompts": held_out,
        // A model of this size needs a low temperature to answer in whole sentences.
        "synthesis": {"max_tokens": args.max_tokens, "temperature": 0.3},
        "training": {"epochs": args.epochs, "batch_size": 4, "learning_rate": 1e-4, "max_length": 512},
        "seed": args.seed,
    });
    let before = ask(client).await?;
    println!("asked before:  {}", before.show());
    let job = client.post("/v1/rdpo/train", &request).await?;
    let id = train::job_id(&job)?;
    println!(
        "job {id}: {} prompts, behaviour `{}`; {} more are held out for the report",
        learnt.len(),
        args.behavior,
        held_out.len()
    );
    let asking = Asking::start(client.clone());
    let started = Instant::now();
    let followed = follow::follow(client, &id, |_| {}).await;
    let asked = asking.stop().await?;
    let followed: Followed = followed?;
    follow::outcome(&followed.job)?;
    train::finish(client, &id, &followed).await?;
    println!(
        "\n  {} answers were asked for during those {:.0} s: {} failed, the slowest took {:.1} s, adapter versions {}.",
        asked.answers,
        started.elapsed().as_secs_f64(),
        asked.failed,
        asked.slowest.as_secs_f64(),
        asked.versions.iter().map(u64::to_string).collect::<Vec<_>>().join(" → "),
    );
    let after = ask(client).await?;
    println!("  asked after:   {}", after.show());
    println!("\nTalk to the aligned student, and to its base as `student:base`:\n");
    let key = if client.has_key() { " -H \"authorization: Bearer $RDPO_API_KEY\"" } else { "" };
    println!("  curl {}/v1/chat/completions{key} -H 'content-type: application/json' -d '{{", client.base());
    println!("    \"model\": \"student\", \"messages\": [{{\"role\": \"user\", \"content\": \"{}\"}}]}}'", held_out[0]);
    match asked.failed {
        0 => Ok(()),
        failed => Err(Error::internal(format!("{failed} requests failed while the job ran"))),
    }
}

fn prompts() -> (Vec<&'static str>, Vec<&'static str>) {
    let (learnt, held_out) = PROMPTS.split_once("\n\n").unwrap_or((PROMPTS, ""));
    (learnt.lines().collect(), held_out.lines().collect())
}

struct Answer {
    text: String,
    version: u64,
    took: Duration,
}

impl Answer {
    fn show(&self) -> String {
        let text = self.text.trim();
        format!("“{PROBE}” → “{text}” (adapter version {}, {:.1} s)", self.version, self.took.as_secs_f64())
    }
}

async fn ask(client: &Client) -> Result<Answer> {
    let since = Instant::now();
    let body = json!({
        "model": "student", "messages": [{"role": "user", "content": PROBE}], "max_tokens": 16, "temperature": 0,
    });
    let reply: Value = client.post("/v1/chat/completions", &body).await?;
    Ok(Answer {
        text: reply["choices"][0]["message"]["content"].as_str().unwrap_or_default().to_owned(),
        version: reply["adapter_version"].as_u64().unwrap_or(0),
        took: since.elapsed(),
    })
}

/// A client that asks again and again.
struct Asking {
    stop: Arc<AtomicBool>,
    task: tokio::task::JoinHandle<Asked>,
}

/// What it saw.
#[derive(Default)]
struct Asked {
    answers: usize,
    failed: usize,
    slowest: Duration,
    versions: Vec<u64>,
}

impl Asking {
    fn start(client: Client) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let task = tokio::spawn(async move {
            let mut asked = Asked::default();
            loop {
                // Read first: one more answer is asked for after the job's end, which shows the new version.
                let last = stopped.load(Ordering::Relaxed);
                asked.answers += 1;
                match ask(&client).await {
                    Ok(answer) => {
                        asked.slowest = asked.slowest.max(answer.took);
                        if asked.versions.last() != Some(&answer.version) {
                            asked.versions.push(answer.version);
                        }
                    }
                    Err(error) => {
                        asked.failed += 1;
                        eprintln!("  asking failed: {error}");
                    }
                }
                if last {
                    return asked;
                }
                tokio::time::sleep(PROBE_PAUSE).await;
            }
        });
        Asking { stop, task }
    }

    async fn stop(self) -> Result<Asked> {
        self.stop.store(true, Ordering::Relaxed);
        self.task.await.map_err(|error| Error::internal(error.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_prompts_are_sixteen_and_the_held_out_ones_are_others() {
        let (learnt, held_out) = prompts();
        assert_eq!((learnt.len(), held_out.len()), (16, 8));
        assert!(held_out.iter().all(|prompt| !learnt.contains(prompt)));
        assert!(
            learnt.iter().chain(&held_out).all(|prompt| !prompt.trim().is_empty() && !prompt.contains(['"', '\'']))
        );
    }
}
