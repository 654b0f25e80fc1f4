package android.os;

/** The thread that a test says. */
public class Process {
    public static int tid;

    public static int myTid() {
        return tid;
    }
}
