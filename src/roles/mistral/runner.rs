//! mistral.rs behind one thread: requests go in, a row of logits comes out for each token, and the token that was drawn from it
//! goes back. It pins another candle than this crate, so what crosses the border is floats and token ids.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_of_mistralrs::{Device, Result as CandleResult, Tensor};
use mistralrs_core::{
    Constraint, CustomLogitsProcessor, MistralRs, NormalRequest, Request, RequestMessage, Response, SamplingParams,
    StopTokens,
};
use tokio::sync::Semaphore;
use tokio::sync::mpsc::{Sender, UnboundedReceiver, UnboundedSender, channel, unbounded_channel};

use super::Plan;
use crate::engine::{Ending, Queue, Usage, Writer};
use crate::error::{Code, Error, Result};
use crate::roles::pool::Counted;
use crate::telemetry::metrics;

mod start;

/// The thread's handle; it ends when this is dropped.
pub(super) struct Runner {
    writers: UnboundedSender<Writer>,
}

impl Runner {
    /// Loads the model; says how long a context it has.
    pub(super) fn start(plan: Plan) -> Result<(Self, usize)> {
        let (writers, received) = unbounded_channel();
        let (ready, loaded) = sync_channel(1);
        std::thread::Builder::new().name(format!("mistralrs-{}", plan.name)).spawn(move || {
            // One thread will do, since mistral.rs has its own.
            let runtime = match tokio::runtime::Builder::new_current_thread().build() {
                Ok(runtime) => runtime,
                Err(error) => return drop(ready.send(Err(error.into()))),
            };
            runtime.block_on(async {
                match start::start(&plan).await {
                    Ok((house, context)) => {
                        let _ = ready.send(Ok(context));
                        house.serve(received).await;
                    }
                    Err(error) => drop(ready.send(Err(error))),
                }
            });
        })?;
        let context = loaded.recv().unwrap_or_else(|_| {
            Err(Error::unprocessable("models", "mistralrs panicked while it loaded the model; the log has its words"))
        })?;
        Ok((Runner { writers }, context))
    }

    /// Takes a request on.
    pub(super) fn run(&self, writer: Writer) -> Result<()> {
        self.writers.send(writer).map_err(|_| Error::new(Code::Overloaded, "mistralrs has stopped"))
    }
}

/// mistral.rs and what bounds it.
struct House {
    engine: Arc<MistralRs>,
    /// One for each sequence that may run at once: mistral.rs begins all that it is given.
    places: Arc<Semaphore>,
    queue: Arc<Queue>,
    /// The token that tells mistral.rs that an answer has ended.
    end: u32,
    /// Ids of the tokenizer.
    vocabulary: usize,
    /// Least tokens of a prompt.
    shortest: usize,
}

impl House {
    async fn serve(self, mut received: UnboundedReceiver<Writer>) {
        let house = Arc::new(self);
        while let Some(writer) = received.recv().await {
            tokio::spawn(house.clone().answer(writer));
        }
    }

    async fn answer(self: Arc<Self>, writer: Writer) {
        let role = writer.request.role;
        let place = {
            let _waiting = Counted::new(&metrics().requests_waiting, role);
            tokio::select! {
                place = self.places.clone().acquire_owned() => place.ok(),
                () = writer.abandoned() => None,
            }
        };
        self.queue.leave(role);
        let Some(_place) = place else { return writer.count("abort") };
        let _running = Counted::new(&metrics().requests_running, role);
        let (metrics, prompt) = (metrics(), writer.request.prompt.clone());
        metrics.request_queue_time_seconds.with_label_values(&[role]).observe(writer.arrived.elapsed().as_secs_f64());
        metrics.prompt_tokens_total.with_label_values(&[role]).inc_by(prompt.len() as u64);
        let mut state = State { writer, output: Vec::new(), ended: false };
        if prompt.len() < self.shortest {
            let text = format!("needs at least {} tokens where mistralrs runs on a GPU", self.shortest);
            return state.end(Ending::Failed(Error::invalid("prompt", text)));
        }
        let hand = Arc::new(Hand { state: Mutex::new(state), end: self.end, vocabulary: self.vocabulary });
        // The receiver lives until mistral.rs is done: an answer that cannot be sent fails all that run beside it.
        let (replies, mut replied) = channel(1);
        let request = self.request(prompt, hand.clone(), replies);
        let why = match self.engine.get_sender(None) {
            Err(error) => error.to_string(),
            Ok(engine) => match engine.send(Request::Normal(Box::new(request))).await {
                Err(_) => "it has stopped".to_owned(),
                Ok(()) => {
                    drop(engine);
                    said(replied.recv().await)
                }
            },
        };
        let mut state = hand.lock();
        if !state.ended {
            tracing::error!(role, why, "mistralrs did not finish an answer");
            state.end(Ending::Failed(Error::internal(format!("mistralrs failed: {why}"))));
        }
    }

    fn request(&self, prompt: Vec<u32>, hand: Arc<Hand>, response: Sender<Response>) -> NormalRequest {
        let params = SamplingParams {
            // The hand leaves it one token to choose.
            temperature: Some(0.0),
            stop_toks: Some(StopTokens::Ids(vec![self.end])),
            ..SamplingParams::neutral()
        };
        NormalRequest {
            messages: RequestMessage::CompletionTokens(prompt),
            sampling_params: params,
            response,
            return_logprobs: false,
            is_streaming: false,
            id: 0,
            constraint: Constraint::None,
            suffix: None,
            tools: None,
            tool_choice: None,
            logits_processors: Some(vec![hand]),
            return_raw_logits: false,
            web_search_options: None,
            model_id: None,
            truncate_sequence: false,
        }
    }
}

/// Chooses the tokens of one answer.
struct Hand {
    state: Mutex<State>,
    end: u32,
    vocabulary: usize,
}

struct State {
    writer: Writer,
    output: Vec<u32>,
    ended: bool,
}

impl Hand {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// The token after these logits; none where the answer has ended.
    fn next(&mut self, logits: &mut [f32]) -> Option<u32> {
        if self.ended {
            return None;
        }
        if self.writer.is_abandoned() {
            self.ended = true;
            self.writer.count("abort");
            return None;
        }
        let outcome = self.writer.read(&self.writer.request.prompt, &self.output, logits);
        let token = outcome.token();
        self.output.extend(token);
        match self.writer.write(outcome, self.output.len()) {
            Some(ending) => {
                self.end(ending);
                None
            }
            None => token,
        }
    }

    fn end(&mut self, ending: Ending) {
        self.ended = true;
        self.writer.count(ending.label());
        // What mistral.rs found in its prefix cache, it does not tell.
        let usage = Usage {
            prompt_tokens: self.writer.request.prompt.len(),
            cached_tokens: 0,
            completion_tokens: self.output.len(),
        };
        self.writer.end(ending, usage);
    }
}

impl CustomLogitsProcessor for Hand {
    /// logits: V values. All of the probability to the token that was drawn here.
    fn apply(&self, logits: &Tensor, _: &[u32]) -> CandleResult<Tensor> {
        #[cfg(test)]
        assert!(!tests::PANICS.swap(false, std::sync::atomic::Ordering::Relaxed), "ordered by a test");
        let mut row = logits.to_vec1::<f32>()?;
        let rows = row.len();
        // Some models have fewer rows than their tokenizer has ids.
        row.resize(rows.max(self.vocabulary), f32::MIN);
        let next = catch_unwind(AssertUnwindSafe(|| self.lock().next(&mut row))).unwrap_or_else(|_| {
            let mut state = self.lock();
            if !state.ended {
                state.end(Ending::Failed(Error::internal("drawing a token panicked. This is a bug.")));
            }
            None
        });
        let mut chosen = vec![0f32; rows];
        if let Some(one) = chosen.get_mut(next.unwrap_or(self.end) as usize) {
            *one = 1.0;
        }
        Tensor::from_vec(chosen, rows, &Device::Cpu)
    }
}

/// Why there is no answer.
fn said(reply: Option<Response>) -> String {
    match reply {
        None => "it stopped in the middle of the answer".into(),
        Some(Response::InternalError(error) | Response::ValidationError(error)) => error.to_string(),
        Some(Response::CompletionModelError(error, _) | Response::ModelError(error, _)) => error,
        Some(_) => "it ended the answer by itself".into(),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::path::Path;
    use std::sync::atomic::{AtomicBool, Ordering};

    use crate::engine::{Event, SamplingParams};
    use crate::error::{Code, Error};
    use crate::roles::{
        AdapterOptions, Backend, DeviceOptions, ModelOptions, RewardOptions, RoleOptions, Roles, RolesOptions,
        RuleOptions,
    };

    /// Lets mistral.rs' own thread panic at the next token.
    pub(super) static PANICS: AtomicBool = AtomicBool::new(false);

    #[test]
    fn after_a_panic_a_request_starts_it_again() {
        let data = tempfile::tempdir().unwrap();
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tiny-llama");
        let model = ModelOptions { path, dtype: "f32".into(), max_model_len: None };
        let roles = Roles::load(RolesOptions {
            device: DeviceOptions { kind: "cpu".into(), ..DeviceOptions::default() },
            kv_cache: Default::default(),
            speculative_config: Default::default(),
            models: [("tiny".to_owned(), model)].into(),
            teacher: RoleOptions { backend: Backend::Mistralrs, ..RoleOptions::native("tiny") },
            student: RoleOptions::native("tiny"),
            reward: RewardOptions::Rules { terms: vec![RuleOptions::JsonValid { weight: 1.0 }] },
            adapters: AdapterOptions { path: data.path().join("adapters"), ..AdapterOptions::default() },
            training_share: 0.5,
        });
        let teacher = roles.unwrap().teacher().unwrap();
        let ask = || {
            let params = SamplingParams { temperature: 0.0, max_tokens: Some(8), ..SamplingParams::default() };
            let mut stream = teacher.generate(vec![5, 9, 20], params).unwrap();
            let mut ids = Vec::new();
            loop {
                match stream.blocking_recv().expect("an answer ends with an event") {
                    Event::Token { id, .. } => ids.push(id),
                    Event::Done { .. } => return Ok::<_, Error>(ids),
                    Event::Failed(error) => return Err(error),
                    _ => {}
                }
            }
        };
        let undisturbed = ask().unwrap();
        PANICS.store(true, Ordering::Relaxed);
        let error = ask().unwrap_err();
        assert_eq!(error.code, Code::Internal);
        assert!(error.message.starts_with("mistralrs failed"), "{error}");
        assert!(!PANICS.load(Ordering::Relaxed), "the panic never came");
        // One that comes while the thread is still going down fails with it.
        let again = (0..100).find_map(|_| {
            let answer = ask().ok();
            if answer.is_none() {
                std::thread::sleep(std::time::Duration::from_millis(20));
            }
            answer
        });
        assert_eq!(again, Some(undisturbed));
    }
}
