package gemmamtp.demo

import gemmamtp.core.AnyDevice
import gemmamtp.core.Decoder
import gemmamtp.core.Device
import gemmamtp.core.InputError
import gemmamtp.core.LoadGraphs
import gemmamtp.core.Message
import gemmamtp.core.Options
import gemmamtp.core.Progress
import gemmamtp.core.Rules
import gemmamtp.core.Sampling
import gemmamtp.core.Stream
import gemmamtp.core.Token
import gemmamtp.core.openDecoder
import gemmamtp.core.readManifest
import java.io.File

/**
 * Opens bundles on disk.
 *
 * @param devices has a folder for what belongs to each bundle on this device: costs, and which files were checked.
 * @param device gives the phone, for each bundle anew.
 */
class BundleOpener(
    private val loadGraphs: LoadGraphs,
    private val devices: File,
    private val device: () -> Device = { AnyDevice },
) : Opener {
    override fun memoryNeeded(bundle: File): Long = readManifest(bundle).memoryNeeded

    override fun open(bundle: File, report: Report): Model {
        val manifest = readManifest(bundle)
        val total = manifest.files.values.sumOf { it.size }
        try {
            val load = LoadGraphs { folder, checked, threads ->
                report.at(Work(Step.LOADING, 0, 0))
                loadGraphs.load(folder, checked, threads)
            }
            val progress = counted(Step.CHECKING, total, report)
            return DecoderModel(openDecoder(bundle, load, File(devices, manifest.digest), device(), progress = progress))
        } catch (error: LinkageError) { // native libraries that are not in the APK, or not for this processor
            throw InputError(
                "$bundle: this app has no ${manifest.backend} libraries for this device (${error.message}); build it" +
                    " with Gradle",
                error,
            )
        }
    }
}

/** A progress that reports the bytes done so far, of a [total], as a [step]. */
private fun counted(step: Step, total: Long, report: Report): Progress {
    var done = 0L
    return Progress { _, bytes ->
        done += bytes
        report.at(Work(step, done, total))
    }
}

private class DecoderModel(private val decoder: Decoder) : Model {
    override val chats get() = decoder.chat?.has() ?: false
    override val thinks get() = decoder.chat?.has(thinking = true) ?: false
    override val contextTokens get() = decoder.manifest.maxSeqLen
    override val defaultDraftTokens get() = decoder.manifest.defaultDraftTokens
    override val sampling: Sampling get() = decoder.manifest.sampling
    override val rules: Rules get() = decoder.options().rules

    override fun write(messages: List<Message>, options: Options, thinking: Boolean): Writing = StreamWriting(
        if (chats) decoder.chat(messages, options, thinking = if (thinking) true else null)
        else decoder.stream(messages.last().content, options),
    )

    override fun forget() = decoder.forget()
    override fun close() = decoder.close()
}

private class StreamWriting(private val stream: Stream) : Writing {
    override val counts: Counts
        get() = stream.stats.let {
            val last = if (it.rounds > 0) it.lastDrafted else null
            Counts(
                it.rounds, stream.tokens.size, it.decodeSeconds, it.acceptanceRate, it.meanTokensPerRound, last,
                stream.tokensLeft, stream.droppedMessages, it.finishReason, it.prefillSeconds,
            )
        }

    override fun hasNext() = stream.hasNext()
    override fun next(): Token = stream.next()
    override fun cancel() = stream.cancel()
}
