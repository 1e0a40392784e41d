//! Logging set-up and every metric in one list. Free to all modules.
//!
//! Labels are few and bounded: role, endpoint, status code, adapter alias, stage, reason. Never a request, a user or a step.

use std::sync::LazyLock;

use prometheus::{
    Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry,
};

const TTFT: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
];
const ITL: &[f64] =
    &[0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0];
const LATENCY: &[f64] = &[
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
];
const SCORE: &[f64] = &[-10.0, -5.0, -3.0, -2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 7.5, 10.0];

macro_rules! metrics {
    ($($field:ident: $kind:ident($help:literal $(, [$($label:literal),*])? $(, $buckets:ident)?);)*) => {
        /// Every metric of the process; the Prometheus name is the field's with prefix `rdpo_`.
        #[derive(Debug)]
        pub struct Metrics {
            /// The registry `/metrics` renders.
            pub registry: Registry,
            $(#[doc = $help] pub $field: $kind,)*
        }

        impl Metrics {
            fn new() -> prometheus::Result<Self> {
                let registry = Registry::new();
                $(
                    let $field = metrics!(@make $kind, concat!("rdpo_", stringify!($field)), $help $(, [$($label),*])? $(, $buckets)?);
                    registry.register(Box::new($field.clone()))?;
                )*
                Ok(Metrics { registry, $($field,)* })
            }
        }
    };
    (@make HistogramVec, $name:expr, $help:literal, [$($label:literal),*], $buckets:ident) => {
        HistogramVec::new(HistogramOpts::new($name, $help).buckets($buckets.to_vec()), &[$($label),*])?
    };
    (@make Histogram, $name:expr, $help:literal, $buckets:ident) => {
        Histogram::with_opts(HistogramOpts::new($name, $help).buckets($buckets.to_vec()))?
    };
    (@make $kind:ident, $name:expr, $help:literal, [$($label:literal),*]) => {
        $kind::new(Opts::new($name, $help), &[$($label),*])?
    };
    (@make $kind:ident, $name:expr, $help:literal) => { $kind::new($name, $help)? };
}

metrics! {
    build_info: IntGaugeVec("Constant 1, labelled with what was built.", ["version", "backend", "git_sha"]);
    model_info: IntGaugeVec("Constant 1, labelled with what each role runs.", ["role", "model", "dtype", "quant"]);
    model_loaded: IntGaugeVec("1 once the role can answer.", ["role"]);
    start_time_seconds: Gauge("Unix time the process was ready.");
    http_requests_total: IntCounterVec("HTTP requests answered.", ["endpoint", "method", "code"]);
    http_request_duration_seconds: HistogramVec("Time to the end of the HTTP answer.", ["endpoint"], LATENCY);
    http_requests_in_flight: IntGauge("HTTP requests being answered.");
    client_disconnects_total: IntCounter("Clients that went away before their answer ended.");
    requests_running: IntGaugeVec("Sequences in the running batch.", ["role"]);
    requests_waiting: IntGaugeVec("Requests waiting for a place in the batch.", ["role"]);
    queue_rejections_total: IntCounterVec("Requests refused because the queue was full.", ["role"]);
    time_to_first_token_seconds: HistogramVec("From arrival to the first token.", ["role"], TTFT);
    inter_token_latency_seconds: HistogramVec("Between two tokens of one answer.", ["role"], ITL);
    e2e_request_latency_seconds: HistogramVec("From arrival to the last token.", ["role"], LATENCY);
    request_queue_time_seconds: HistogramVec("From arrival to the first step.", ["role"], LATENCY);
    prompt_tokens_total: IntCounterVec("Prompt tokens read.", ["role"]);
    generation_tokens_total: IntCounterVec("Tokens generated.", ["role"]);
    spec_decode_num_drafts_total: IntCounterVec("Drafts verified.", ["role"]);
    spec_decode_num_draft_tokens_total: IntCounterVec("Tokens of the drafts verified.", ["role"]);
    spec_decode_num_accepted_tokens_total: IntCounterVec("Of these, tokens that were right.", ["role"]);
    prompt_tokens_cached_total: IntCounterVec("Prompt tokens found in the prefix cache.", ["role"]);
    request_success_total: IntCounterVec("Requests ended, by reason.", ["role", "finish_reason"]);
    preemptions_total: IntCounter("Sequences put back because the pool was full.");
    kv_cache_usage_ratio: GaugeVec("Share of KV blocks held by live sequences.", ["model"]);
    prefix_cache_queries_total: IntCounterVec("Prompt tokens looked up in the prefix cache.", ["role"]);
    prefix_cache_hits_total: IntCounterVec("Prompt tokens found in the prefix cache.", ["role"]);
    remote_endpoint_up: IntGaugeVec("1 while the endpoint of a remote role answers.", ["role", "endpoint"]);
    reward_score: Histogram("Scores given by the reward role.", SCORE);
    reward_parse_failures_total: IntCounter("Reward answers that could not be read as a number.");
    adapter_active_version: IntGaugeVec("Live version of the alias; 0 for none.", ["adapter"]);
    adapter_swaps_total: IntCounterVec("Publications of the alias, by result.", ["adapter", "result"]);
    adapter_swap_duration_seconds: Histogram("Time a publication took.", TTFT);
    adapter_resident_bytes: IntGauge("Bytes of adapters in memory.");
    adapters_resident: IntGauge("Adapter generations in memory.");
    adapter_leases: IntGaugeVec("Requests holding a generation of the alias.", ["adapter"]);
    adapter_requests_total: IntCounterVec("Requests answered under the alias.", ["adapter"]);
    adapter_load_failures_total: IntCounterVec("Adapters refused, by reason.", ["reason"]);
    pairs_generated_total: IntCounter("Self-critique conversations finished.");
    pairs_kept_total: IntCounter("Pairs kept for training.");
    pairs_dropped_total: IntCounterVec("Pairs dropped, by reason.", ["reason"]);
    critique_duration_seconds: Histogram("Time of one self-critique conversation.", LATENCY);
    pair_score_gap: Histogram("Score of the revised answer minus score of the first.", SCORE);
    revised_win_ratio: Gauge("Share of the job's pairs whose revised answer scored higher.");
    train_jobs: IntGaugeVec("Jobs by status.", ["status"]);
    train_step: IntGauge("Optimizer step of the current job.");
    train_epoch: Gauge("Epoch of the current job.");
    train_loss: Gauge("Loss of the last step.");
    train_rewards_chosen: Gauge("Implicit reward of chosen answers, last step.");
    train_rewards_rejected: Gauge("Implicit reward of rejected answers, last step.");
    train_rewards_margin: Gauge("Implicit reward margin, last step.");
    train_rewards_accuracy: Gauge("Share of pairs with the chosen answer ahead, last step.");
    train_logps_chosen: Gauge("Summed log-prob of chosen answers, last step.");
    train_logps_rejected: Gauge("Summed log-prob of rejected answers, last step.");
    train_kl: Gauge("KL of the new adapter to the base on held-out prompts, nats a token.");
    train_grad_norm: Gauge("Gradient norm before the clip, last step.");
    train_learning_rate: Gauge("Learning rate of the last step.");
    train_step_duration_seconds: Histogram("Time of one optimizer step.", LATENCY);
    train_tokens_total: IntCounter("Tokens trained on.");
    train_pairs_total: IntCounter("Pairs trained on.");
    train_nonfinite_steps_total: IntCounter("Steps with a loss or gradient that is not finite.");
    train_checkpoint_duration_seconds: Histogram("Time of one checkpoint.", TTFT);
    train_last_checkpoint_timestamp_seconds: Gauge("Unix time of the last checkpoint.");
    gpu_memory_bytes: IntGaugeVec("Memory of the device (main memory on the CPU): held now by each use, free, and in total.", ["kind"]);
    gpu_memory_planned_bytes: IntGaugeVec("What the settings give each use of the device's memory.", ["kind"]);
    gpu_utilization_ratio: Gauge("Share of the time since the last scrape in which serving or training held the device.");
    train_serve_logprob_gap: Gauge("Largest gap between trainer and server log-probs on the probe batch, nats a token.");
}

/// The process's metrics.
pub fn metrics() -> &'static Metrics {
    static METRICS: LazyLock<Metrics> =
        LazyLock::new(|| Metrics::new().expect("metric names are distinct and valid. This is a bug."));
    &METRICS
}

/// Lets the series of the three roles begin at 0: a rate over a series that is not there yet misses its first step.
pub fn start_series() {
    let metrics = metrics();
    for role in ["teacher", "reward", "student"] {
        for gauge in [&metrics.requests_running, &metrics.requests_waiting] {
            gauge.with_label_values(&[role]).set(0);
        }
        for counter in [
            &metrics.queue_rejections_total,
            &metrics.prompt_tokens_total,
            &metrics.generation_tokens_total,
            &metrics.prompt_tokens_cached_total,
            &metrics.prefix_cache_queries_total,
            &metrics.prefix_cache_hits_total,
            &metrics.spec_decode_num_drafts_total,
            &metrics.spec_decode_num_draft_tokens_total,
            &metrics.spec_decode_num_accepted_tokens_total,
        ] {
            counter.with_label_values(&[role]).inc_by(0);
        }
        for reason in ["stop", "length", "abort", "error"] {
            metrics.request_success_total.with_label_values(&[role, reason]).inc_by(0);
        }
    }
}

/// What mistral.rs says while all is well (it warns of paged attention on every CPU) is not for this server's users.
const USUAL_LEVELS: &str = "info,mistralrs_core=error,mistralrs_quant=error";

/// Sends log lines to standard error; `RUST_LOG` chooses what (default `info`), `RDPO_LOG_FORMAT=json` how.
pub fn init_logging() {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| USUAL_LEVELS.into());
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let json = std::env::var("RDPO_LOG_FORMAT").is_ok_and(|format| format == "json");
    let result = if json { lines.json().try_init() } else { lines.try_init() };
    if let Err(error) = result {
        tracing::debug!(%error, "logging was set up before");
    }
}
