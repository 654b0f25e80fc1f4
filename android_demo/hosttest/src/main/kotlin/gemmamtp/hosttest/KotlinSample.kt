package gemmamtp.hosttest

import gemmamtp.core.InputError
import gemmamtp.core.Message
import gemmamtp.core.closeAndJoin
import gemmamtp.core.loadDecoder
import gemmamtp.core.onDecoder
import gemmamtp.onnx.OnnxRuntime
import java.io.File
import kotlin.system.exitProcess
import kotlinx.coroutines.runBlocking

/** What an app does, in Kotlin. Arguments: a bundle, a folder for what belongs to the device, a prompt, a session's file. */
fun main(arguments: Array<String>) = runBlocking {
    try {
        val decoder = loadDecoder(File(arguments[0]), OnnxRuntime(), deviceFolder = File(arguments[1]))
        try {
            val session = File(arguments[3])
            val conversation =
                if (session.exists()) decoder.onDecoder { decoder.openSession(session) } else decoder.conversation()
            val stream =
                if (decoder.chat == null) conversation.stream(arguments[2], decoder.options(40))
                else conversation.chat(listOf(Message("user", arguments[2])), decoder.options(40))
            stream.asFlow().collect { print(it.text) }
            decoder.onDecoder { conversation.save(session) }
        } finally {
            decoder.closeAndJoin()
        }
    } catch (error: InputError) {
        System.err.println(error.message)
        exitProcess(2)
    }
}
