package gemmamtp.demo

import gemmamtp.core.InputError
import gemmamtp.core.Message
import gemmamtp.core.Options
import gemmamtp.core.THOUGHT
import gemmamtp.core.Token
import gemmamtp.core.WhenFull
import java.security.SecureRandom
import java.util.concurrent.Executor

/**
 * The app's state and its one worker: a bundle, a conversation, and the work in progress.
 *
 * All methods return at once and may be called from any thread. Requests while the session is busy are refused, and
 * return false. Only the worker uses the model.
 *
 * @param available gives the bytes of memory that a bundle may take now.
 * @param memoryLow whether the system is about to end apps; asked once a round.
 * @param worker runs one job at a time, in order.
 * @param seed gives the seed of each answer.
 * @param changed called after each change of [screen], on whichever thread made it.
 */
class Session(
    private val bundles: Bundles,
    private val opener: Opener,
    private val available: () -> Long,
    private val memoryLow: () -> Boolean,
    private val worker: Executor,
    private val seed: () -> Long = SecureRandom()::nextLong,
    private val changed: () -> Unit,
) {
    @Volatile
    var screen = Screen()
        private set

    // Set and read by several threads: each thread that sets one of them reads the other after that.
    @Volatile
    private var stopping = false

    @Volatile
    private var writing: Writing? = null

    // Used by the worker only.
    private var model: Model? = null
    private var asked: BundleFolder? = null

    /** Open a bundle instead of the one that is open. */
    fun open(bundle: BundleFolder): Boolean = start(Phase.OPENING) { load(bundle, false) }

    /** Copy a bundle into the app's storage and open it. */
    fun install(source: BundleSource): Boolean {
        val started = start(Phase.COPYING) {
            val bundle = source.use { bundles.install(it, ::report) }
            update { it.copy(phase = Phase.OPENING, work = null) }
            load(bundle, false)
        }
        if (!started) source.close()
        return started
    }

    /**
     * Download a bundle, open it on trial if memory allows, and then in its place. An earlier download of it goes on.
     *
     * @param ended called when it has ended, however it did.
     */
    fun download(url: String, digest: String, ended: () -> Unit = {}): Boolean = start(Phase.COPYING, ended = ended) {
        val bundle = bundles.download(url, digest, ::report) {
            close() // two bundles at once would not fit
            // Else the system may end the app, and the download would come here again and again.
            if (opener.memoryNeeded(it) <= available()) opener.open(it, ::report).close()
        }
        update { it.copy(phase = Phase.OPENING, work = null) }
        load(bundle, false)
    }

    /** Open the bundle that was asked for last, even if memory is short. */
    fun reopen(): Boolean = start(Phase.OPENING) { asked?.let { load(it, true) } }

    /** Answer a prompt. */
    fun send(prompt: String): Boolean = start(Phase.WRITING, Phase.READY) {
        val model = checkNotNull(model)
        val before = screen.talk
        val messages = ArrayList<Message>()
        if (model.chats && screen.system.isNotBlank()) messages.add(Message("system", screen.system))
        for ((asked, answer) in before.filter { it.answer.isNotEmpty() }) { // templates drop thoughts of earlier turns
            messages.add(Message("user", asked))
            messages.add(Message("assistant", answer))
        }
        messages.add(Message("user", prompt))
        val thinking = screen.thinking && model.thinks
        val answer = StringBuilder()
        val thought = StringBuilder()
        update { it.copy(talk = before + Exchange(prompt, ""), counts = null) }
        // A model that finds no end stops after as many tokens as its context has; before that, the user may stop it.
        val options = Options(
            model.contextTokens, draftTokens(model), model.sampling.copy(seed = seed()), model.rules,
            whenFull = WhenFull.SHIFT,
        )
        write(model.write(messages, options, thinking)) { token, counts ->
            answer.append(token.text)
            if (token.part == THOUGHT) thought.append(token.partText)
            update { it.copy(talk = before + Exchange(prompt, answer.toString(), thought.toString()), counts = counts) }
        }
    }

    /** Measure the answer to a prompt, plain and with drafts; the conversation does not change. */
    fun benchmark(prompt: String): Boolean = start(Phase.BENCHMARKING, Phase.READY) {
        val model = checkNotNull(model)
        val drafts = if (screen.drafting == Drafting.OFF) model.defaultDraftTokens else draftTokens(model)
        val comparison = benchmark(model, prompt, drafts, ::report) { writing ->
            val tokens = write(writing) { _, counts -> update { it.copy(counts = counts) } }
            if (stopping) throw Stopped()
            tokens
        }
        update { it.copy(comparison = comparison) }
    }

    /** Choose the number of drafts a round of the next answer. */
    fun draft(drafting: Drafting) = update { it.copy(drafting = drafting) }

    /** Begin conversations with this from the next prompt on. */
    fun instruct(system: String) = update { it.copy(system = system) }

    /** Choose whether the next answers are thought about. */
    fun think(thinking: Boolean) = update { it.copy(thinking = thinking) }

    /** Begin a new conversation. */
    fun newChat() = update {
        if (it.busy) it else it.copy(talk = emptyList(), counts = null, comparison = null, problem = null)
    }

    /** Stop the work in progress as soon as possible. */
    fun stop() {
        stopping = true
        writing?.cancel()
    }

    /** Stop generating, because the app went out of view; copying and opening go on. */
    fun background() {
        if (screen.phase == Phase.WRITING || screen.phase == Phase.BENCHMARKING) stop()
    }

    /** Close the bundle, because the app is not in view and the system asks for memory. */
    fun leaveMemory() {
        if (screen.phase == Phase.COPYING) return // it takes no memory, and goes on later if the process is ended
        val stopped = screen.busy
        stop()
        worker.execute {
            if (model != null || (stopped && screen.problem == null)) { // `stopped`: opening was stopped
                // In one step, so that no job starts on a model that is about to be closed; a job that started keeps it.
                update { if (it.busy) it else it.copy(phase = Phase.IDLE, problem = Problem.ClosedForMemory) }
                if (screen.phase == Phase.IDLE) close()
            }
        }
    }

    private fun draftTokens(model: Model): Int? = when (screen.drafting) {
        Drafting.OFF -> 0
        Drafting.ON -> model.defaultDraftTokens
        Drafting.AUTO -> null
    }

    private fun load(bundle: BundleFolder, anyway: Boolean) {
        close() // two bundles at once would not fit
        val same = asked == bundle
        asked = bundle
        update { it.copy(bundle = bundle.name, talk = if (same) it.talk else emptyList(), counts = null) }
        val needed = opener.memoryNeeded(bundle.dir)
        val free = available()
        if (needed > free && !anyway) {
            update { it.copy(problem = Problem.MemoryShort(needed, free)) }
            return
        }
        report(Work(Step.LOADING, 0, 0))
        val opened = opener.open(bundle.dir, ::report)
        model = opened
        update { it.copy(chats = opened.chats, thinks = opened.thinks) }
    }

    /** Generate a text to its end, or until it is stopped; returns its token ids. */
    private fun write(text: Writing, token: (Token, Counts) -> Unit): List<Int> {
        val tokens = ArrayList<Int>()
        var rounds = 0
        writing = text
        if (stopping) text.cancel()
        try {
            for (new in text) {
                tokens.add(new.id)
                val counts = text.counts
                token(new, counts)
                // Since Android 14 no callback says it while the app is in view.
                if (counts.rounds > rounds && memoryLow()) {
                    stop()
                    update { it.copy(problem = Problem.StoppedForMemory) }
                }
                rounds = counts.rounds
            }
        } finally {
            writing = null
        }
        return tokens
    }

    private fun report(work: Work) {
        if (stopping) throw Stopped()
        update { it.copy(work = work) }
    }

    private fun close() {
        val closed = model
        model = null
        try {
            closed?.close()
        } catch (_: Exception) { // it is gone in any case
        }
    }

    /** Start a job, unless the session is busy, or not in the phase [from]. */
    private fun start(phase: Phase, from: Phase? = null, ended: () -> Unit = {}, job: () -> Unit): Boolean {
        synchronized(this) {
            if (screen.busy || (from != null && screen.phase != from)) return false
            stopping = false
            screen = screen.copy(phase = phase, problem = null, comparison = null, work = null)
        }
        changed()
        worker.execute {
            var problem: Problem? = null
            try {
                job()
            } catch (error: InputError) {
                problem = Problem.Refused(error.message.orEmpty())
            } catch (_: Stopped) {
                // the user or the system asked for it
            } catch (_: OutOfMemoryError) {
                close()
                problem = Problem.OutOfMemory
            } catch (error: Throwable) { // else it would end the app; nobody knows in what state the model is
                close()
                problem = Problem.Failed(error.message?.lineSequence()?.first() ?: error.javaClass.simpleName)
            }
            val end = if (model == null) Phase.IDLE else Phase.READY
            update { it.copy(phase = end, work = null, problem = problem ?: it.problem) }
            ended()
        }
        return true
    }

    private fun update(change: (Screen) -> Screen) {
        synchronized(this) { screen = change(screen) }
        changed()
    }
}
