//! Ranks as processes that are connected by TCP: for CPU devices, on one machine or several.
//!
//! Every rank has a connection to every other, a thread that writes to it and one that reads, so posting never
//! waits for the network and a message is taken in whatever its receiver does. Nothing is encrypted, and whoever
//! reaches rank 0's port while ranks gather can pose as one: for networks that are trusted.
//!
//! A process that dies is noticed at once by all, as its connections close. One that stalls is noticed by
//! whoever waits for it, after the timeout; ranks then ask one another for whom they wait, and name the one that
//! keeps the others waiting.

mod rendezvous;
mod wire;

pub use rendezvous::{Identity, Timeouts, connect, host, join};

use std::collections::HashMap;
use std::io::{BufReader, BufWriter, ErrorKind, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::inbox::{Inbox, Parcel};
use super::transport::{Activity, Fault, Transport, silence};
use crate::error::{Error, Result};
use wire::Frame;

/// How long a rank has to say for whom it waits; its reading thread does, whatever else it is at.
const ANSWER_TIME: Duration = Duration::from_secs(2);
/// How long a rank that has failed goes on to tell the others.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// What a rank's threads have in common.
struct State {
    rank: usize,
    timeout: Duration,
    inbox: Inbox,
    /// For whom this rank waits.
    waits: Mutex<Option<usize>>,
    /// What others have answered.
    answers: Mutex<HashMap<usize, Option<usize>>>,
    answered: Condvar,
    /// Held while all others are told something.
    telling: Mutex<()>,
    /// Queues of the writing threads; none for this rank.
    queues: Vec<Option<Sender<Frame>>>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl State {
    /// Hands a frame to a writing thread. One that has gone has told why.
    fn send(&self, to: usize, frame: Frame) {
        if let Some(queue) = &self.queues[to] {
            let _ = queue.send(frame);
        }
    }

    fn send_all(&self, frame: &Frame) {
        (0..self.queues.len()).for_each(|rank| self.send(rank, frame.clone()));
    }

    fn fail(&self, fault: &Fault) {
        // Whoever learns of it here may say goodbye at once: the others must have been told before.
        let _telling = locked(&self.telling);
        if self.inbox.fail(fault) {
            self.send_all(&Frame::Fault(fault.clone()));
            self.answered.notify_all();
        }
    }

    /// The connection to `peer` does not work any more.
    fn lost(&self, peer: usize, why: &std::io::Error) {
        if self.inbox.has_ended(peer) {
            return;
        }
        self.fail(&match why.kind() {
            ErrorKind::WouldBlock | ErrorKind::TimedOut => {
                Fault::failure(format!("rank {peer} has taken nothing for {:?}", self.timeout))
            }
            ErrorKind::InvalidData => Fault::failure(format!("rank {peer} has sent {why}")),
            _ => Fault::failure(format!("rank {peer} has died: its connection is closed")),
        });
    }

    /// What `peer` is doing.
    fn ask(&self, peer: usize) -> Activity {
        locked(&self.answers).remove(&peer);
        self.send(peer, Frame::Ask);
        let deadline = Instant::now() + ANSWER_TIME;
        let mut answers = locked(&self.answers);
        loop {
            if let Some(answer) = answers.get(&peer) {
                return answer.map_or(Activity::Busy, Activity::WaitsFor);
            }
            let left = deadline.checked_duration_since(Instant::now());
            let Some(left) = left.filter(|_| self.inbox.fault().is_none()) else { return Activity::Mute };
            answers = self.answered.wait_timeout(answers, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Takes in what `peer` sends, until it has ended.
    fn read(&self, peer: usize, stream: TcpStream) {
        let mut stream = BufReader::with_capacity(1 << 16, stream);
        loop {
            match wire::read(&mut stream) {
                Ok(Frame::Data { channel, bytes }) => {
                    self.inbox.deliver(peer, channel, Parcel { bytes, arrival: 0.0 });
                }
                Ok(Frame::Fault(fault)) => {
                    self.inbox.fail(&fault);
                    self.answered.notify_all();
                }
                Ok(Frame::Goodbye) => return self.inbox.end(peer),
                Ok(Frame::Ask) => self.send(peer, Frame::Answer(*locked(&self.waits))),
                Ok(Frame::Answer(answer)) => {
                    // What a damaged frame names is nobody.
                    let answer = answer.filter(|&rank| rank < self.queues.len());
                    locked(&self.answers).insert(peer, answer);
                    self.answered.notify_all();
                }
                Err(error) => return self.lost(peer, &error),
            }
        }
    }

    /// Writes what is queued for `peer`, until this rank has ended.
    fn write(&self, peer: usize, stream: &TcpStream, queue: &Receiver<Frame>) {
        let mut out = BufWriter::with_capacity(1 << 16, stream);
        for frame in queue {
            if let Err(error) = wire::write(&mut out, &frame).and_then(|()| out.flush()) {
                // Nothing more is taken; what is buffered is not tried again.
                let _ = out.into_parts();
                return self.lost(peer, &error);
            }
            if frame == Frame::Goodbye {
                let _ = stream.shutdown(Shutdown::Write);
                return;
            }
        }
    }
}

/// The connections of a rank.
struct Tcp {
    state: Arc<State>,
    /// Ends when all writing threads have.
    written: Mutex<Receiver<()>>,
}

impl Tcp {
    /// Over one connection to each other rank.
    fn new(rank: usize, streams: Vec<Option<TcpStream>>, timeout: Duration) -> Result<Self> {
        let size = streams.len();
        let (queues, receivers): (Vec<_>, Vec<_>) = streams
            .iter()
            .map(|stream| match stream {
                Some(_) => {
                    let (sender, receiver) = channel();
                    (Some(sender), Some(receiver))
                }
                None => (None, None),
            })
            .unzip();
        let state = Arc::new(State {
            rank,
            timeout,
            inbox: Inbox::new(size),
            waits: Mutex::new(None),
            answers: Mutex::default(),
            answered: Condvar::new(),
            telling: Mutex::default(),
            queues,
        });
        let (writing, written) = channel();
        let cannot =
            |error: std::io::Error| Error::failure(format!("rank {rank} cannot be connected: {error}"));
        for (peer, (stream, queue)) in streams.into_iter().zip(receivers).enumerate() {
            let (Some(stream), Some(queue)) = (stream, queue) else { continue };
            stream.set_nodelay(true).map_err(cannot)?;
            stream.set_read_timeout(None).map_err(cannot)?;
            stream.set_write_timeout(Some(timeout)).map_err(cannot)?;
            let incoming = stream.try_clone().map_err(cannot)?;
            let (reader, writer, writing) = (state.clone(), state.clone(), writing.clone());
            let thread = |what| std::thread::Builder::new().name(format!("{what} rank {peer}"));
            thread("from").spawn(move || reader.read(peer, incoming)).map_err(cannot)?;
            thread("to")
                .spawn(move || {
                    writer.write(peer, &stream, &queue);
                    drop(writing);
                })
                .map_err(cannot)?;
        }
        Ok(Self { state, written: Mutex::new(written) })
    }
}

impl Transport for Tcp {
    fn rank(&self) -> usize {
        self.state.rank
    }

    fn size(&self) -> usize {
        self.state.queues.len()
    }

    fn timeout(&self) -> Duration {
        self.state.timeout
    }

    fn post(&self, to: usize, channel: u64, bytes: &[u8]) -> Result<()> {
        if let Some(fault) = self.state.inbox.fault() {
            return Err(fault.error());
        }
        self.state.send(to, Frame::Data { channel, bytes: bytes.to_vec() });
        Ok(())
    }

    fn receive(&self, from: usize, channel: u64) -> Result<Vec<u8>> {
        let state = &self.state;
        *locked(&state.waits) = Some(from);
        let end = |fault: Fault| {
            state.fail(&fault);
            // An earlier one may have ended the ranks.
            state.inbox.fault().unwrap_or(fault).error()
        };
        match state.inbox.take(from, channel, state.timeout) {
            Ok(Some(parcel)) => {
                *locked(&state.waits) = None;
                Ok(parcel.bytes)
            }
            Ok(None) => {
                let message = silence(state.rank, from, state.timeout, |rank| state.ask(rank));
                Err(end(Fault::failure(message)))
            }
            Err(fault) => Err(end(fault)),
        }
    }

    fn fail(&self, fault: &Fault) {
        self.state.fail(fault);
    }

    fn fault(&self) -> Option<Fault> {
        self.state.inbox.fault()
    }
}

impl Drop for Tcp {
    /// Says goodbye, and waits until what was posted has left.
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.state.fail(&Fault::failure(format!("rank {} panicked", self.state.rank)));
        }
        {
            let _telling = locked(&self.state.telling);
            self.state.send_all(&Frame::Goodbye);
        }
        let time = if self.state.inbox.fault().is_some() { LAST_WORDS } else { self.state.timeout };
        // The end of all senders; nothing is ever sent.
        let _ = locked(&self.written).recv_timeout(time);
    }
}
